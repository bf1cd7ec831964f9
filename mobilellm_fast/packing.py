"""From a model source to an image in memory, through a cache of packed images on disk."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from . import quant
from .cache import cache_directory
from .checkpoint import locate, open_path
from .errors import CheckpointError, MobileLLMError
from .files import brief
from .image import SUFFIX, VERSION, Image, open_image
from .version import __version__
from .weights import read_weights

# Files of a model directory that an image depends on.
SOURCE_SUFFIXES = (".bin", ".jinja", ".json", ".model", ".safetensors")

KEPT_FORMATS = quant.INTEGER_FORMATS  # float formats are as large as their source


def load_image(
    source: str | Path | None = None,
    format: str = "auto",
    revision: str | None = None,
    threads: int = 1,
    float_format: str = "int8",
) -> Image:
    """Return a model in memory: from a packed image if there is one, else packed now.

    A model packed into one of the integer formats is kept in the cache directory, so that it is
    there in milliseconds the next time. An image in the cache that is stale or damaged is made
    anew; a cache that cannot be written only costs the time.

    Args:
        source, revision: see `checkpoint.locate`; also a `.mlf` image.
        format: one of `quant.FORMATS`, or "auto".
        threads: to compute checksums with.
        float_format: what "auto" takes for a source that is not quantized.

    Raises:
        MobileLLMError: an unknown format, or one that an image does not have.
        CheckpointError: the source cannot be found, read or trusted.
    """
    check_format(format)
    path, name = locate(source, revision)
    if path.suffix == SUFFIX:
        image = open_image(path, threads=threads)
        if format not in ("auto", image.format):
            raise MobileLLMError(f"[load] format of {path} is {image.format!r}, got {format!r}")
        return image

    state = _state(path)
    choice = format if float_format == "int8" else f"{format} {float_format}"
    place = hashlib.sha256(f"{path.resolve()}\0{choice}".encode()).hexdigest()[:32]
    try:
        cached = cache_directory() / "images" / f"{place}{SUFFIX}"
    except OSError:  # no home directory
        return pack_checkpoint(path, name, format, float_format)
    with contextlib.suppress(CheckpointError):
        return open_image(cached, state, threads)
    if source is None:  # it comes with a checksum; an image of damaged weights would stay
        from .checkpoint.default_model import verify_default_model

        verify_default_model(path)
    image = pack_checkpoint(path, name, format, float_format)
    if image.format in KEPT_FORMATS:
        with contextlib.suppress(CheckpointError):
            image.save(cached, state)
    return image


def pack_checkpoint(
    path: Path, name: str | None = None, format: str = "auto", float_format: str = "int8"
) -> Image:
    """Read a checkpoint and pack it, without any cache. Arguments and errors as above."""
    check_format(format)
    checkpoint = open_path(path, name)
    if format == "auto":
        in_4_bits = checkpoint.dtype in ("int4", "int4_sym")
        format = checkpoint.format or ("int4" if in_4_bits else float_format)
    if format in KEPT_FORMATS and checkpoint.tokenizer:
        checkpoint.tokenizer.compile()  # now: what it needs would come on top of the weights
    weights, buffer = read_weights(checkpoint, format)
    return Image(
        checkpoint.config,
        weights,
        buffer,
        format,
        checkpoint.tokenizer,
        checkpoint.chat_template,
        checkpoint.name,
    )


def check_format(format: str) -> None:
    """Refuse what is neither "auto" nor one of `quant.FORMATS`."""
    known = ("auto", *quant.FORMATS)
    if format not in known:
        raise MobileLLMError(f"[load] format must be one of {', '.join(known)}, got {format!r}")


def _state(path: Path) -> str:
    """Describe the files that an image is made from, and the code that made it."""
    digest = hashlib.sha256(f"{VERSION} {__version__}".encode())
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in SOURCE_SUFFIXES)
        else:
            files = [path.resolve()]
        for file in files:
            status = file.stat()
            digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from None
    return digest.hexdigest()
