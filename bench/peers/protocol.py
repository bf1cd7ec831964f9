"""What every worker speaks: a JSON command per line in, a JSON answer per line out.

    {"op": "prefill", "tokens": 512}                  -> {"seconds": [one]}
    {"op": "decode", "context": 128, "tokens": 64}    -> {"seconds": [one per token]}
    {"op": "batch", "sequences": 8, "context": 128, "tokens": 64}
                                                      -> {"seconds": [one per step of all]}
    {"op": "logits", "ids": [...], "path": "x.npy"}   -> {}; writes float32 (tokens, vocabulary)

The first line out, {"ready": ...}, describes the engine; a failed command answers {"error": ...}.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path

import numpy as np

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Engine(ABC):
    """One engine with a model loaded; its methods take token ids and time themselves."""

    version: str
    vocab_size: int
    weight_nbytes: int

    @abstractmethod
    def __init__(self, path: str, threads: int, **options: str) -> None: ...

    @abstractmethod
    def prefill(self, ids: list[int]) -> float:
        """Return the seconds from the ids to the logits, or first token, that follow them."""

    @abstractmethod
    def decode(self, ids: list[int], tokens: int) -> list[float]:
        """Return the seconds of each of `tokens` greedy steps that follow `ids`."""

    def batch(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Return the seconds of each of `tokens` greedy steps of all prompts together."""
        raise NotImplementedError("batches of this engine are not measured")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return float32 (len(ids), vocabulary)."""
        raise NotImplementedError("this engine does not show its logits")


def serve(kind: type[Engine]) -> None:
    """Load the model that the command line names, then answer standard input until it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    if sys.platform == "linux":
        # A driver that is killed must not leave its workers behind, stopped as they mostly are.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's own prints must not come between the answers

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    options = dict(option.split("=", 1) for option in args.option)
    engine = kind(args.path, args.threads, **options)
    answer(ready=True, version=engine.version, weight_nbytes=engine.weight_nbytes)
    rng = np.random.default_rng(0)

    def prompt(tokens: int) -> list[int]:
        # Any ids take the same time, but they are new ones each time: some engines keep the
        # states of earlier prompts, and would be timed doing nothing.
        return rng.integers(engine.vocab_size, size=tokens).tolist()

    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["op"] == "prefill":
                answer(seconds=[engine.prefill(prompt(command["tokens"]))])
            elif command["op"] == "decode":
                ids = prompt(command["context"])
                answer(seconds=engine.decode(ids, command["tokens"]))
            elif command["op"] == "batch":
                prompts = [prompt(command["context"]) for _ in range(command["sequences"])]
                answer(seconds=engine.batch(prompts, command["tokens"]))
            elif command["op"] == "logits":
                np.save(command["path"], engine.logits(command["ids"]).astype(np.float32))
                answer()
            else:
                raise ValueError(f"unknown op {command['op']!r}")
        except Exception as error:  # the driver reports it, and may go on with other commands
            answer(error=f"{type(error).__name__}: {error}")


def nbytes(path: str, *patterns: str) -> int:
    """Return the bytes of the files in a directory that match a pattern."""
    return sum(file.stat().st_size for p in patterns for file in Path(path).glob(p))


def differences(times: list[float]) -> list[float]:
    """Return the seconds from each time to the next."""
    return [after - before for before, after in pairwise(times)]
