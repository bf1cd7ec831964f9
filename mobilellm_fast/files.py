"""Small helpers around files that others wrote."""

import contextlib
import errno
import json
import os
import reprlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, MobileLLMError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that does not exist is an empty one.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:  # half of a pair would be no text to anyone
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def checked_path(name: str, value: Any) -> Path:
    """Return an argument as a path; `name` is what an error calls it: "[operation] argument".

    Raises:
        MobileLLMError: it is no path, or an empty one, which would be the working directory.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise MobileLLMError(f"{name} must be a path, got {brief(value)}")
    return Path(value)


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that appears complete under its name, or not at all.

    Args:
        path: a file there is replaced; a device or a pipe is not, which a rename would destroy.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() or path.is_dir()):  # rename refuses directories itself
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def brief(value: object) -> str:
    """Return an exception's text, or the repr of anything else, as one short line."""
    if isinstance(value, OSError) and value.strerror:
        return value.strerror  # without the file's name, which may be a temporary one
    if isinstance(value, Exception):
        text = str(value).strip() or type(value).__name__
        return text.splitlines()[0][:200]
    return " ".join(reprlib.repr(value).split())
