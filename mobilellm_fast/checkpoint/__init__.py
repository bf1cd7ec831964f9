"""Model sources: a Hugging Face directory, a hub id, a GGUF file, or the default model."""

import re
from pathlib import Path

from ..errors import CheckpointError
from ..files import brief
from .checkpoint import Checkpoint, StoredTensor

__all__ = ["Checkpoint", "StoredTensor", "locate", "open_checkpoint", "open_path"]

TINY = "tiny"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.gguf)(?<!\.mlf)")


def locate(source: str | Path | None = None, revision: str | None = None) -> tuple[Path, str]:
    """Find a model, fetching it if need be, and return its path and its name.

    Args:
        source: a directory with config.json, a `.gguf` or `.mlf` file, a hub id such as
            "facebook/MobileLLM-125M", "tiny" for the small model in this package, or None for the
            default model. A path wins over a name.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: the source is missing or cannot be fetched; says what is wrong.
    """
    if source is not None and not (isinstance(source, (str, Path)) and str(source)):
        raise CheckpointError(f"source must be a path or a hub id, got {brief(source)}")
    path = None if source is None else _existing(source)
    if path is None and source == TINY and revision is None:
        return Path(__file__).parents[1] / TINY, TINY
    if path is None and isinstance(source, str) and HUB_ID.fullmatch(source):
        from .hub import fetch_repository

        return fetch_repository(source, revision), source
    if revision is not None:
        raise CheckpointError(f"revision needs a hub id as source, got source {source!r}")
    if source is None:
        from .default_model import NAME, default_model

        return default_model(), NAME
    if path is None:
        raise CheckpointError(f"{source}: no such file or directory")
    return path, path.resolve().name.removesuffix(".gguf")


def open_checkpoint(source: str | Path | None = None, revision: str | None = None) -> Checkpoint:
    """Open a model and check it, without reading its weights.

    Args:
        source, revision: see `locate`.

    Raises:
        CheckpointError: the source is missing, damaged or not supported; says what is wrong.
    """
    return open_path(*locate(source, revision))


def open_path(path: Path, name: str | None = None) -> Checkpoint:
    """Open a directory or a GGUF file, as `open_checkpoint` does, under a name for display."""
    if path.is_dir():
        from .huggingface import open_directory

        return open_directory(path, name)
    if path.suffix == ".mlf":
        raise CheckpointError(f"{path}: is packed already; must be a directory or a GGUF file")
    if not (path.suffix == ".gguf" or _is_gguf(path)):
        raise CheckpointError(f"{path}: must be a directory, a GGUF file or a packed .mlf image")
    from .gguf import open_gguf

    return open_gguf(path, name)


def _is_gguf(path: Path) -> bool:
    """Tell by its beginning whether a file of another name is one: ollama's have no suffix."""
    if not path.is_file():  # a pipe would wait
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from None


def _existing(source: str | Path) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, no home
        raise CheckpointError(f"source must be a path or a hub id ({brief(error)})") from None
