"""Environments of other engines, and processes that hold one engine each."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from export import FORMATS, export

HERE = Path(__file__).resolve().parent
OURS = "ours"
IN_PLACE = ("torch",)  # peers in our own environment, as the extra "test" installs them
TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16"}
INSTALLED = "installed.txt"  # a copy of the requirements, written when all of them are there
# For llama.cpp, which is compiled here; two jobs, for a small machine's memory.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}

# optimum-intel asks for torchvision, which text models do not need, and which breaks transformers
# where pip chose builds of it and of torch that do not belong together.
UNWANTED = {"openvino": ["torchvision"]}


class Unavailable(Exception):
    """An engine cannot be measured; the message says why, and what helps."""


@dataclass(frozen=True)
class Spec:
    """An engine as written on the command line: NAME:FORMAT[:OPTION=VALUE]..."""

    name: str
    format: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read a peer.

        Raises:
            ValueError: no such peer, or format of it.
        """
        name, _, rest = text.partition(":")
        format, *options = rest.split(":")
        if format not in FORMATS.get(name, ()):
            known = ", ".join(f"{peer}:{format}" for peer in FORMATS for format in FORMATS[peer])
            raise ValueError(f"a peer must be one of {known}, got {text!r}")
        if not all("=" in option for option in options):
            raise ValueError(f"a peer's options must be NAME=VALUE, got {text!r}")
        return cls(name, format, tuple(options))

    @classmethod
    def parse_ours(cls, text: str) -> "Spec":
        """Read FORMAT[:OPTION=VALUE]... of our own engine."""
        format, *options = text.split(":")
        return cls(OURS, format, tuple(options))

    def __str__(self) -> str:
        return ":".join((self.name, self.format, *self.options))


def requirements(name: str) -> Path:
    return HERE / "requirements" / f"{name}.txt"


def state(name: str, root: Path) -> str:
    """Return "installed", "missing", or "outdated" (installed by other requirements)."""
    if name in IN_PLACE:
        found = all(importlib.util.find_spec(module) for module in (name, "transformers"))
        return "installed" if found else "missing"
    marker = root / name / INSTALLED
    if not marker.exists():
        return "missing"
    same = marker.read_text() == requirements(name).read_text()
    return "installed" if same else "outdated"


def install(name: str, root: Path) -> None:
    """Make a peer's environment, or bring it to the pinned versions.

    Raises:
        CalledProcessError: pip failed.
        ValueError: the peer has no environment of its own.
    """
    if name in IN_PLACE:
        raise ValueError(f"{name} is a peer in our own environment: pip install '.[bench]'")
    folder = root / name
    (folder / INSTALLED).unlink(missing_ok=True)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "-r", requirements(name)]
    subprocess.run(command, env=_peer_environment() | BUILD, check=True)
    for package in UNWANTED.get(name, ()):
        subprocess.run([python, "-m", "pip", "uninstall", "-y", package], check=True)
    (folder / INSTALLED).write_text(requirements(name).read_text())


def _peer_environment() -> dict[str, str]:
    """Return the environment without what would lead a peer to our Python's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


class Worker:
    """A process that holds one engine; it is stopped whenever it has nothing to answer.

    Attributes:
        about: what the engine says of itself: `version`, `weight_nbytes`.

    Raises:
        Unavailable: the engine is not there, or failed; says what it printed last.
    """

    def __init__(self, spec: Spec, model: str | None, threads: int, root: Path) -> None:
        if spec.name == OURS:
            python, path, environment = sys.executable, f"{spec.format}@{model or ''}", os.environ
        else:
            if (found := state(spec.name, root)) != "installed":
                how = f"python bench/peers.py install {spec.name}"
                raise Unavailable(f"{spec.name} is {found} ({how})")
            python, environment = root / spec.name / "bin" / "python", _peer_environment()
            if spec.name in IN_PLACE:
                python, environment = sys.executable, os.environ
            try:
                path = export(spec.name, spec.format, model, root)
            except (ValueError, RuntimeError) as error:
                raise Unavailable(str(error)) from None
        script = HERE / "peers" / f"worker_{spec.name.replace('.', '_').replace('-', '_')}.py"
        options = [option for option in spec.options if not option.startswith("threads=")]
        for option in set(spec.options) - set(options):
            threads = int(option.removeprefix("threads="))
        if spec.name == "torch":
            options.append(f"dtype={TORCH_TYPES[spec.format]}")
        command = [python, script, path, "--threads", str(threads)]
        command += [f"--option={option}" for option in options]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **arguments) -> dict:
        """Let the engine do one command of `peers/protocol.py`, and return its answer."""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it ended; `_answer` says how
            print(json.dumps({"op": op, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"it ended with status {status}: {last}")
        # Threads of many engines spin for a while after their work, and would slow the next one.
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
