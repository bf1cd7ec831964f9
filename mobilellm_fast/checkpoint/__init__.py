"""Model sources: a Hugging Face directory, a hub id, a GGUF file, or the default model."""

import re
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint, StoredTensor

__all__ = ["Checkpoint", "StoredTensor", "open_checkpoint"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def open_checkpoint(source: str | Path | None = None, revision: str | None = None) -> Checkpoint:
    """Open a model and check it, without reading its weights.

    Args:
        source: a directory with config.json, a `.gguf` file, a hub id such as
            "facebook/MobileLLM-125M", or None for the default model. A path wins over a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: the source is missing, damaged or not supported; says what is wrong.
    """
    if source is None:
        if revision is not None:
            raise CheckpointError(f"revision needs a hub id as source, got revision {revision!r}")
        from .default_model import NAME, default_model
        from .gguf import open_gguf

        return open_gguf(default_model(), NAME)
    if not isinstance(source, (str, Path)):
        raise CheckpointError(f"source must be a path or a hub id, got {source!r}")
    path = Path(source).expanduser()
    try:
        is_path = path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise CheckpointError(f"source must be a path or a hub id ({error})") from None
    if not is_path and isinstance(source, str) and HUB_ID.fullmatch(source):
        if not source.endswith(".gguf"):
            from .hub import fetch_repository
            from .huggingface import open_directory

            return open_directory(fetch_repository(source, revision), source)
    if not is_path:
        raise CheckpointError(f"{source}: no such file or directory")
    if revision is not None:
        raise CheckpointError(f"revision needs a hub id as source, and {source} is a path")
    if path.is_dir():
        from .huggingface import open_directory

        return open_directory(path)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{source}: must be a directory or a .gguf file")
    from .gguf import open_gguf

    return open_gguf(path)
