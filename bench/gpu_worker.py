"""A process that holds one peer: its compiling, and its crash, are its own.

    python bench/gpu_worker.py PEER PRESET CONTEXT [--dry]

speaks lines of JSON: `{"ready": seconds, "versions": {...}}` first, then for each
`{"count": tokens}` on standard input `{"seconds": ..., "ids": [...]}` or `{"error": ...}`.

PEER may also be `ours/KIND/TIER`, or `op` with names of ops instead of PRESET: it then only
runs once, which leaves compiled kernels in Triton's cache for a process that times them.
"""

import argparse
import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from time import perf_counter

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
WARM_STEPS = 5  # torch.compile compiles, records and only then replays


class WorkerFault(Exception):
    """A peer cannot be measured; the message says why."""


class GpuWorker:
    """A peer in its own process, which gets ready while we do something else.

    Raises:
        WorkerFault: from all methods, the peer cannot be measured.
    """

    def __init__(self, peer: str, preset: str, context: int, dry: bool) -> None:
        command = [sys.executable, __file__, peer, preset, str(context)] + ["--dry"] * dry
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about: dict | None = None  # what it said when it was ready

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # it ended

    def wait(self, seconds: float) -> dict | None:
        """Wait until it is ready, or so many seconds; returns what it says of itself, or None."""
        if self.about is None:
            self.about = self._answer(seconds)
        return self.about

    def pause(self) -> None:
        """Stop what it does until `resume`: it shall not disturb what is timed."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def decode(self, count: int, seconds: float = 30) -> dict:
        """Return `{"seconds": of all steps, "ids": ...}` of so many greedy steps."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"count": count}), file=self._process.stdin, flush=True)
        answer = self._answer(seconds)
        if answer is None:
            self.close()
            raise WorkerFault(f"it did not decode {count} tokens in {seconds:.0f} s")
        return answer

    def _answer(self, seconds: float) -> dict | None:
        try:
            line = self._lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            return None
        if not line:
            self._lines.put("")  # for the next question
            raise WorkerFault(f"it ended with status {self._process.wait()}: {self._last_line()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFault(answer["error"])
        return answer

    def _last_line(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["no output"])[-1][:400]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def make(name: str, preset: str, context: int, dry: bool):
    """Return what decodes, or None for what only compiles."""
    import torch
    from gpu_models import device_of, shape
    from gpu_ours import Ours, executor
    from gpu_peers import PEERS
    from gpu_plain import random_ids, random_weights

    torch.set_grad_enabled(False)
    if name == "op":
        if dry:
            sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
            from interpreted import interpret_kernels

            interpret_kernels()
        from gpu_op_works import Sizes, op_works

        for op in preset.split(","):
            op_works(dry)[op](Sizes(device_of(dry), 0, dry)).ours()[0]()
        return None
    config = shape(preset, dry)
    weights = random_weights(config, device_of(dry), torch.bfloat16)
    prompts = [random_ids(config, context)]
    if name.startswith("ours/"):
        _, kind, tier = name.split("/")
        Ours(executor(config, weights, kind, tier, dry), prompts).decode(2)
        return None
    peer = PEERS[name](config, weights, context)
    peer.start(prompts)
    peer.decode(WARM_STEPS)
    return peer


def compiler_facts() -> dict:
    """Say whether a compiled peer is whole: its graphs, and those that got no CUDA graph."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "without_cuda_graph": counters["inductor"]["cudagraph_skips"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer")
    parser.add_argument("preset")
    parser.add_argument("context", type=int)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if sys.platform == "linux":  # a killed driver must not leave it behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's own prints must not come between the answers

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    started = perf_counter()
    try:
        from gpu_timing import describe

        peer = make(args.peer, args.preset, args.context, args.dry)
        about = {"versions": peer.versions, "compiler": compiler_facts()} if peer else {}
        answer(ready=perf_counter() - started, **about)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}"[:600])
        return
    for line in sys.stdin if peer else ():
        try:
            seconds, ids = peer.decode(json.loads(line)["count"])
            answer(seconds=seconds, ids=ids)
        except Exception as error:
            traceback.print_exc()
            answer(error=describe(error))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
