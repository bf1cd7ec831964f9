"""The course of a run as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from ..files import whole_file
from .checkpoints import State


def write(folder: Path, state: State) -> None:
    """Write `loss.csv` and, if matplotlib is installed, `loss.png`."""
    lines = ["step,loss,validation"]
    for step, loss in enumerate(state.losses, 1):
        lines.append(f"{step},{loss:.6f},{state.validations.get(step, '')}")
    with whole_file(folder / "loss.csv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(range(1, len(state.losses) + 1), state.losses, linewidth=0.8, label="training")
    if state.validations:
        axes.plot(*zip(*sorted(state.validations.items()), strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(folder / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)
