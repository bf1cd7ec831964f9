"""A user whom the system does not know: a container may run as one."""

from pathlib import Path


def take_home_away(monkeypatch) -> None:
    """Leave no place for a cache."""

    def fails():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MOBILELLM_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fails)
