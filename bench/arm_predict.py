"""Predict tokens/s on ARM devices from `bench/arm/model.json`: a prediction, not a measurement.

decode   = 1 / max(weight bytes / bandwidth, MACs / (cores * clock * modelled GEMV rate))
prefill  = EFFICIENCY * cores * clock * modelled GEMM rate / MACs of a prompt's token

Bandwidth is what a device's cores together are assumed to read: SUSTAINED of its memory's peak.
EFFICIENCY is for what the model leaves out: misses, attention, rounding, low codes of wide groups.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MODEL = json.loads(Path(__file__).with_name("arm").joinpath("model.json").read_text())
BLOCK_MACS, HEAD_MACS = 106.2e6, 28.3e6  # SmolLM2-135M, per token; a prompt needs the head once
WEIGHTS = {"int8": 137.0e6, "int4": 96.6e6}  # bytes, README.md
SUSTAINED = 0.6
EFFICIENCY = 0.6


@dataclass
class Device:
    name: str
    cores: int  # that work: the fast ones
    clock: float  # Hz
    table: str
    core: str  # of llvm-mca, which stands for them
    memory: float  # bytes per second at its peak


DEVICES = [
    Device(
        "Raspberry Pi 5 (4 x A76, LPDDR4X-4267 x 32)", 4, 2.4e9, "dotprod", "neoverse-n1", 17.1e9
    ),
    Device("phone, 4 x A78 (LPDDR5-6400 x 32)", 4, 2.4e9, "dotprod", "neoverse-n1", 25.6e9),
    Device("phone, X2 + 3 x A710 (LPDDR5-6400 x 64)", 4, 2.5e9, "i8mm", "neoverse-n2", 51.2e9),
]


def predict(device: Device, format: str) -> tuple[float, float, str]:
    """Return tokens/s of decode and prefill, and what bounds decode."""

    def rate(loop: str) -> float:  # MAC/s
        core = MODEL[f"{device.table} {loop}_{format}"]["cores"][device.core]
        return device.cores * device.clock * core["macs_per_cycle"]

    memory = WEIGHTS[format] / (SUSTAINED * device.memory)
    arithmetic = (BLOCK_MACS + HEAD_MACS) / rate("gemv")
    bound = "memory" if memory > arithmetic else "arithmetic"
    return 1 / max(memory, arithmetic), EFFICIENCY * rate("gemm") / BLOCK_MACS, bound


if __name__ == "__main__":
    print("| device | format | decode, tokens/s | bound by | prefill, tokens/s |")
    print("|---|---|---|---|---|")
    for device in DEVICES:
        for format in WEIGHTS:
            decode, prefill, bound = predict(device, format)
            print(f"| {device.name} | `{format}` | {decode:.0f} | {bound} | {prefill:.0f} |")
