"""The state of a run as one file, which is whole or not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import brief, whole_file
from ..model import MobileLLM
from .recipe import Recipe

NAME = "checkpoint.pt"
VERSION = 1


@dataclasses.dataclass
class State:
    """What a run has come to, and all that it needs to go on with the same bits.

    Batches follow from seed and step, so there is no state of a random generator.

    Args:
        step: optimizer steps done.
        losses: training loss of each step, in nats.
        validations: step -> loss.
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    validations: dict[int, float] = dataclasses.field(default_factory=dict)


def save(
    path: Path,
    model: MobileLLM,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    state: State,
    corpus: str,
) -> None:
    """Write a checkpoint in place of the one before, which stays until the new one is complete.

    Raises:
        CheckpointError: it cannot be written, or a parameter is not finite; the old one stays.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{path}: not written, {name} is not finite")
    content = {
        "version": VERSION,
        "config": model.config.to_hf(),
        "recipe": dataclasses.asdict(recipe),
        "corpus": corpus,
        "state": dataclasses.asdict(state),
        "model": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
    }
    try:
        with whole_file(path) as file:
            torch.save(content, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({brief(error)})") from None


def restore(
    path: Path, model: MobileLLM, optimizer: torch.optim.Optimizer, recipe: Recipe, corpus: str
) -> State:
    """Read a checkpoint into a model and its optimizer.

    Raises:
        CheckpointError: it is damaged, or of another configuration, recipe or text; says which.
    """
    content = _read(path)
    _same(path, "config", content["config"], model.config.to_hf())
    _same(path, "recipe", content["recipe"], dataclasses.asdict(recipe))
    _same(path, "text", {"digest": content["corpus"]}, {"digest": corpus})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(content["model"][name])
    optimizer.load_state_dict(content["optimizer"])
    return State(**content["state"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint to resume from") from None
    except Exception as error:  # torch raises a dozen unrelated types for damaged files
        raise CheckpointError(f"{path}: not a readable checkpoint ({brief(error)})") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a checkpoint of version {VERSION}")
    return content


def _same(path: Path, what: str, stored: dict, wanted: dict) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path}: is of another {what}: {name} is {stored.get(name)!r} there, "
                f"{wanted.get(name)!r} here"
            )
