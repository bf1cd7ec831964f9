"""Energy of the processor's packages, where Linux lets us read it (RAPL through powercap)."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NOT_READABLE = "not readable here"


class Meter:
    """Counts joules; `readable` is False where the counters are absent or not ours to read."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
        # packages are named intel-rapl:N; their parts, intel-rapl:N:M, are counted in them
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        try:
            self.joules()
            self.readable = bool(self._zones)
        except (OSError, ValueError):
            self.readable = False

    def joules(self) -> list[float]:
        """Return the counters now."""
        return [int((zone / "energy_uj").read_text()) / 1e6 for zone in self._zones]

    def since(self, before: list[float]) -> float:
        """Return the joules since `before`, which `joules` returned; counters may wrap once."""
        total = 0.0
        for zone, then, now in zip(self._zones, before, self.joules(), strict=True):
            if now < then:
                now += int((zone / "max_energy_range_uj").read_text()) / 1e6
            total += now - then
        return total
