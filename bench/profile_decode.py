"""Where a decoded token's time goes on a GPU: tiers, kernels, and stages of the persistent kernels.

    python bench/profile_decode.py 125M 1.5B/int4 --tiers pdl persistent --context 128

Random weights, greedy steps by the clock, the median of five runs of 64. For the persistent kernel,
a copy of it that stores the device's clock between the stages says how long each takes, from the
end of the one before: so the wait for its inputs belongs to it.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from gpu_models import nbytes_per_token, shape
from random_cuda_weights import random_cuda_cache, random_cuda_weights
from sweep_ring import ROUNDS, STEPS, time_steps

from mobilellm_fast.cuda import steps
from mobilellm_fast.cuda.executor import TIERS, CudaExecutor

WATCHED = 33  # every so many programs one stores the clock
FIELDS = 8  # places of a layer
# Stages end where the kernel's source goes on with these calls.
ENDS = {
    "start": "            query(\n",
    "query": "            splits, _ = split_plan",
    "attend": "            output(\n",
    "output": "            gate_up(\n",
    "gate_up": "            project(\n",
    "down": "            epoch += 5\n",
}
MARK = """@triton.jit
def _mark(counter, program, index):
    if program % {watched} == 0:
        time = tl.extra.cuda.globaltimer() & 0x7FFFFFFF
        tl.store(counter + 64 + program // {watched} * 65536 + index, time.to(tl.int32))


@triton.jit(do_not"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="a size, and a kind of weights: 125M, 1.5B/int4")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--context", type=int, default=128)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for model in args.models:
        name, _, kind = model.partition("/")
        config = shape(name, False)
        weights = random_cuda_weights(config, kind or "bf16")
        nbytes = nbytes_per_token(config, kind or "bf16", args.context)
        for tier in args.tiers:
            executor = CudaExecutor(config, weights, tier)
            seconds = median(time_steps(executor, args.context) for _ in range(ROUNDS))
            rate = nbytes / seconds / 1e9
            print(f"{model} {tier}: {seconds * 1e6:.0f} us a token, {rate:.0f} GB/s", flush=True)
            detail = {"persistent": stage_times, "ring": ring_times}.get(tier, kernel_times)
            for label, microseconds in detail(executor, args.context).items():
                print(f"    {label}: {microseconds:.2f} us", flush=True)


def ring_times(executor: CudaExecutor, context: int) -> dict[str, float]:
    """Return microseconds of program 0's stages in a layer, of the kernel that stores the clock."""
    stages, parts = ("query", "output", "gate and up", "down"), ("inputs", "product", "results")
    names = [f"{stage}, {part}" for stage in stages for part in parts]
    names.insert(3, "attention")
    constants = {"CLOCKED": len(names) * len(executor.config.schedule)}
    clocked = CudaExecutor(executor.config, executor.weights, "ring", constants=constants)
    cache = random_cuda_cache(clocked, context, STEPS + 1)
    for _ in range(2):  # the first compiles
        cache.truncate(context)
        clocked.decode(cache, 5, STEPS)
    ends = clocked._steps.clock.double().cpu()
    spans = ends.diff().view(-1)[len(names) - 1 :].unfold(0, len(names), len(names))
    return dict(zip(names, (spans.mean(0) / 1e3).tolist(), strict=True))


def kernel_times(executor: CudaExecutor, context: int) -> dict[str, float]:
    """Return the mean microseconds of each kernel of a step; with launches that overlap, the wait
    for the kernel before is part of it."""
    cache = random_cuda_cache(executor, context, STEPS + 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        executor.decode(cache, 5, STEPS)
        torch.cuda.synchronize()
    return {
        f"{event.key} x {event.count // STEPS}": event.self_device_time_total / event.count
        for event in profile.key_averages()
        if event.key.endswith("_kernel") and event.count >= STEPS
    }


def stage_times(executor: CudaExecutor, context: int) -> dict[str, float]:
    """Return the mean microseconds of each stage of a layer, and of the head."""
    length = len(executor.config.schedule)
    room = (-(-executor._steps.programs // WATCHED)) * 65536
    if STEPS * (length + 1) * FIELDS > 65536:
        raise SystemExit("too many layers to watch")
    counter = torch.zeros(64 + room, dtype=torch.int32, device=executor.weights.device)
    plain, executor._steps._counter = steps.persistent, counter
    with tempfile.TemporaryDirectory() as folder:
        steps.persistent = marked(plain, Path(folder))
        try:
            cache = random_cuda_cache(executor, context, STEPS + 1)
            for _ in range(2):
                cache.truncate(context)
                executor.decode(cache, 5, STEPS)
        finally:
            steps.persistent = plain
    marks = counter[64:].view(-1, 65536)[:, : STEPS * (length + 1) * FIELDS]
    marks = marks.view(-1, STEPS, length + 1, FIELDS).cpu().double()[:, 2:] / 1e3
    layers, head = marks[:, :, :length], marks[:, :, length]
    spans = (layers[..., 1 : len(ENDS)] - layers[..., : len(ENDS) - 1]).mean(dim=(0, 1, 2))
    found = dict(zip(list(ENDS)[1:], spans.tolist(), strict=True))
    return found | {"head": (head[..., 1] - head[..., 0]).mean().item()}


def marked(module, folder: Path):
    """Return a copy of the persistent kernel's module that stores the clock between stages."""
    text = Path(module.__file__).read_text()
    place = "(step * (length + 1) + {slot}) * {fields} + {number}"
    marks = [(line, "slot", number) for number, line in enumerate(ENDS.values())]
    marks += [
        ("        candidate(\n", "length", 0),
        ("        token, logprob = choose", "length", 1),
    ]
    for line, slot, number in marks:
        if text.count(line) != 1:
            raise SystemExit(f"the kernel's source has {text.count(line)} lines {line.strip()!r}")
        indent = re.match(" *", line).group()
        index = place.format(slot=slot, fields=FIELDS, number=number)
        text = text.replace(line, f"{indent}_mark(counter, program, {index})\n{line}")
    text = text.replace("@triton.jit(do_not", MARK.format(watched=WATCHED), 1)
    name = f"{module.__name__}_marked"
    path = folder / "persistent_marked.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    made.__package__ = module.__package__
    spec.loader.exec_module(made)
    return made


if __name__ == "__main__":
    main()
