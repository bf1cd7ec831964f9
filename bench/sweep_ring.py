"""Times forms of the kernel `ring` beside each other, and beside `pdl`, on a GPU.

    python bench/sweep_ring.py 125M 1.5B/int4 600M-shared [--forms "as it is" "both"]

Random weights, 64 greedy steps at a time by the clock, all forms in turns, the median of five. What
does not choose the tokens of `pdl` at three contexts, or is not the same twice, is told.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from gpu_models import nbytes_per_token, shape
from gpu_timing import synchronize
from random_cuda_weights import random_cuda_cache, random_cuda_weights

from mobilellm_fast.cuda.executor import CudaExecutor
from mobilellm_fast.errors import MobileLLMError

MODELS = ["125M", "1.5B", "1.5B/int8", "1.5B/int4", "600M-shared", "600M-unshared", "350M"]
STEPS, ROUNDS = 64, 5
CONTEXTS = (0, 128, 700)  # of the check: without tokens, in one part and in several
LARGEST_ERROR = 2e-3  # see tests/test_ring_gpu.py
FORMS = {
    "as it is": {},
    "a warp that finishes": {"finishers": 1},
    "two warps that finish": {"finishers": 2},
    "weights leave the L2 cache first": {"constants": {"LEAVE_FIRST": 1}},
    "both": {"finishers": 1, "constants": {"LEAVE_FIRST": 1}},
    "attention by tiles": {"constants": {"ATTEND_BY_TILES": 1}},
    "attention by tiles, a warp that finishes": {
        "finishers": 1,
        "constants": {"ATTEND_BY_TILES": 1},
    },
    "attention by tiles, both": {
        "finishers": 1,
        "constants": {"ATTEND_BY_TILES": 1, "LEAVE_FIRST": 1},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=MODELS, help="a shape, and a kind of weights: 125M, 1.5B/int4"
    )
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--json", type=Path, help="a file for the seconds of all turns")
    args = parser.parse_args()
    results = {}
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for model in args.models:
        preset, _, kind = model.partition("/")
        config = shape(preset, False)
        weights = random_cuda_weights(config, kind or "bf16")
        executors = {"pdl": CudaExecutor(config, weights, "pdl")}
        wanted = [decoded(executors["pdl"], context) for context in CONTEXTS]
        for name in args.forms:
            print(f"{model}, {name}: tried", flush=True)  # the last line, should it hang
            try:
                executor = CudaExecutor(config, weights, "ring", **FORMS[name])
                for context, want in zip(CONTEXTS, wanted, strict=True):
                    for line in complaints(executor, context, *want):
                        print(f"{model}, {name}, {context} tokens: {line}", flush=True)
            except MobileLLMError as error:  # neither compiled nor launched, or no numbers
                print(f"{model}, {name}: {error}", flush=True)
            else:
                executors[name] = executor
        times = {name: [] for name in executors}
        for _ in range(ROUNDS):
            for name, executor in executors.items():
                times[name].append(time_steps(executor, args.context))
        results[model] = times
        if args.json:
            args.json.write_text(json.dumps(results))
        nbytes = nbytes_per_token(config, kind or "bf16", args.context)
        for name, taken in times.items():
            seconds = median(taken)
            spread = ", ".join(f"{each * 1e6:.0f}" for each in sorted(taken))
            rate = nbytes / seconds / 1e9
            print(
                f"{model}, {name}: {seconds * 1e6:.0f} us ({spread}), {rate:.0f} GB/s", flush=True
            )


def complaints(
    executor: CudaExecutor, context: int, tokens: list[int], logits: torch.Tensor
) -> Iterator[str]:
    """Say in what steps differ from those that are wanted, and from themselves."""
    found, got = decoded(executor, context)
    again, got_again = decoded(executor, context)
    if found != again or not torch.equal(got, got_again):
        yield "not the same twice"
    if found != tokens:
        yield f"chose {found}, pdl {tokens}"
    error = float((got - logits).norm() / logits.norm())
    if not error < LARGEST_ERROR:
        yield f"logits are off by {error:.1e} of their norm"


def decoded(executor: CudaExecutor, context: int) -> tuple[list[int], torch.Tensor]:
    """Return the tokens of a few steps, and the logits of the last."""
    tokens, _ = executor.decode(random_cuda_cache(executor, context, STEPS + 1), 5, 8)
    return tokens, executor._steps.logits.clone()


def time_steps(executor: CudaExecutor, context: int) -> float:
    """Return the seconds of a step, after one run to warm up."""
    cache = random_cuda_cache(executor, context, STEPS + 1)
    for _ in range(2):
        cache.truncate(context)
        synchronize(executor.weights.device)
        started = perf_counter()
        executor.decode(cache, 5, STEPS)
        synchronize(executor.weights.device)
        taken = (perf_counter() - started) / STEPS
    return taken


if __name__ == "__main__":
    main()
