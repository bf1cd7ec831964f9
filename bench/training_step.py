"""Times and weighs a training step beside the same model in transformers: eager, compiled, graphed.

    python bench/training_step.py --threads 1 --layers 2 --batch 1 --seq 256
    python bench/training_step.py --device cuda --host --out results.json  # 30 layers, 8 x 1024

Forward, loss, backward and AdamW, with the same weights on the same tokens; before anything is
timed, losses and gradients have to agree. The candidates take turns, step by step, so that what
else the machine does meets them alike; medians, and medians of the ratios of each round. Each is
timed alone as soon as it is ready, and the modes are timed, shown and saved one after the other,
the slowest to prepare last: compiling takes most of the time.

`host` is the eager step with so few tokens that the GPU waits for the host; `--host` adds what each
op takes of it.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from machine import command, processor
from training_host import print_table
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mobilellm_fast import MobileLLM, MobileLLMConfig
from mobilellm_fast.files import whole_file

# layers, batch, seq, rounds, dtype
DEFAULTS = {"cpu": (4, 2, 256, 7, "fp32"), "cuda": (30, 8, 1024, 15, "bf16")}
HOST_SHAPE = (1, 16)
MODES = ("host", "eager", "graphed", "blocks", "compiled", "reduced")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}
# How far ours and theirs may be apart: losses in nats, gradients as a share of their length. With 8
# bits, thirty layers lose about 0.02 of a gradient, each in its own way.
AGREE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 0.1), "mixed": (2e-2, 0.1)}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # for fp32 on a GPU, both alike
    config = dataclasses.replace(
        MobileLLMConfig.preset("MobileLLM-125M"), num_hidden_layers=args.layers
    )
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), device=args.device)
    weights = MobileLLM(config).state_dict()
    say("losses and gradients")
    agreed = agreement(config, weights, ids, args)
    candidates: list[Candidate] = []
    found: dict[str, dict] = {}
    host = print_table(config, args.device, DTYPES[args.dtype]) if args.host else None
    for mode in args.modes:
        for owner in ("ours", "transformers"):
            if time.perf_counter() - STARTED > args.seconds:
                say(f"{owner}, {mode}: left out, for want of time")
                continue
            candidate = Candidate(owner, mode, config, weights, ids, args)
            candidates.append(candidate)
            say(f"{candidate.name}: ready after {candidate.ready_after:.1f} s; {candidate.alone()}")
        take_turns([c for c in candidates if c.mode == mode], args.rounds)
        print(table(candidates), flush=True)
        found |= {c.name: c.result() for c in candidates if c.mode == mode}
        if args.out:
            save(args, found, agreed, host)
        if mode == "host":
            candidates.clear()  # the others are of another size
    if len(args.modes) > 1:
        say("all in turn")
        take_turns(candidates, args.rounds)
        print(table(candidates), flush=True)
        found |= {c.name: c.result() for c in candidates}
        if args.out:
            save(args, found, agreed, host)
    say("done")


def take_turns(candidates: list["Candidate"], rounds: int) -> None:
    for candidate in candidates:
        candidate.seconds.clear()
    for _ in range(rounds):
        for candidate in candidates:
            candidate.seconds.append(candidate.step())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("layers", "batch", "seq", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cpu")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="mixed: weights in fp32, products in bf16"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="host: of few tokens, eager; graphed, of a GPU: the whole step is recorded as a CUDA "
        "graph; compiled: the model; reduced: that, by torch's mode reduce-overhead, which records "
        "CUDA graphs; blocks: each of its blocks, for which one is compiled",
    )
    parser.add_argument("--host", action="store_true", help="print the host time of each op")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing new after so long"
    )
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    args = parser.parse_args()
    if args.modes is None:
        args.modes = MODES[1:5] if args.device == "cuda" else ("eager", "compiled")
        args.modes = ["host"] * args.host + list(args.modes)
    for name, default in zip(
        ("layers", "batch", "seq", "rounds", "dtype"), DEFAULTS[args.device], strict=True
    ):
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


class Candidate:
    """A model with its optimizer, which has done its first steps.

    Args:
        owner: "ours" or "transformers".
        mode: one of `MODES`.
        config, weights: the model.
        ids: (batch, seq) tokens to train on.
        args: those of the command.
    """

    def __init__(self, owner, mode, config, weights, ids, args) -> None:
        self.name, self.owner, self.mode, self.device = f"{owner}, {mode}", owner, mode, args.device
        if mode == "host":
            ids = ids[: HOST_SHAPE[0], : HOST_SHAPE[1]]
        self.title = f"{args.layers} layers, {tuple(ids.shape)} tokens, {args.dtype}, {args.device}"
        self.tokens = ids.numel()
        started = time.perf_counter()
        self.model = build(owner, config, weights, args)
        run = self.model
        if mode in ("compiled", "reduced"):
            run = torch.compile(self.model, mode="reduce-overhead" if mode == "reduced" else None)
        elif mode == "blocks":
            for layer in self.model.model.layers:
                layer.compile()
        self.loss = loss_function(owner, run, ids, args)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=True, capturable=mode == "graphed"
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._run = self._step
        if mode == "graphed":
            self._run = self._record()
        for _ in range(3):
            self.step()
        self.ready_after = time.perf_counter() - started
        self.megabytes = self._megabytes()

    def alone(self) -> str:
        """Time a few steps and say how long they take."""
        seconds = statistics.median(self.step() for _ in range(5))
        first, last = self.losses[0], self.losses[-1]
        if not last < first:
            sys.exit(f"{self.name}: no step lowers the loss: {first} became {last}")
        return f"{1e3 * seconds:.1f} ms per step alone, loss {first:.3f} -> {last:.3f}"

    def step(self) -> float:
        """Do one step and return its seconds."""
        synchronize(self.device)
        started = time.perf_counter()
        loss = self._run()
        synchronize(self.device)
        seconds = time.perf_counter() - started
        self.losses.append(loss.item())
        return seconds

    def _step(self) -> torch.Tensor:
        if self.mode == "reduced":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _record(self) -> Callable[[], torch.Tensor]:
        """Return the step as one CUDA graph, which has no launches to wait for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay

    def _megabytes(self) -> float | None:
        """What a step takes beside what lies there between steps; of a CPU only what is kept."""
        if self.mode in ("graphed", "host"):
            return None  # a graph keeps its memory between steps
        if self.device == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        return kept_megabytes(self.model, self.loss) if self.mode == "eager" else None

    def result(self) -> dict:
        return {
            "seconds": self.seconds,
            "median_seconds": statistics.median(self.seconds),
            "megabytes": self.megabytes,
            "ready_after_seconds": self.ready_after,
            "tokens": self.tokens,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }


def build(owner: str, config: MobileLLMConfig, weights: dict, args: argparse.Namespace):
    if owner == "ours":
        model = MobileLLM(config)
    else:
        model = LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    model.load_state_dict(weights)
    return model.to(args.device, DTYPES[args.dtype]).train()


def loss_function(owner: str, run: Callable, ids, args) -> Callable[[], torch.Tensor]:
    def loss():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "mixed"):
            return run(ids, ids) if owner == "ours" else run(ids, labels=ids, use_cache=False).loss

    return loss


def agreement(config, weights, ids, args) -> dict[str, float]:
    """Compare a step's loss and gradients in eager mode; ends the run if they are not the same."""
    losses, gradients = [], []
    for owner in ("ours", "transformers"):
        model = build(owner, config, weights, args)
        loss = loss_function(owner, model, ids, args)()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    ours, theirs = gradients
    far = sum((ours[name] - theirs[name]).square().sum().item() for name in theirs) ** 0.5
    length = sum(grad.square().sum().item() for grad in theirs.values()) ** 0.5
    found = {"loss": abs(losses[0] - losses[1]), "gradient": far / length}
    print(f"losses {losses[0]:.5f} and {losses[1]:.5f}, gradients {far / length:.1e} apart")
    for (name, value), limit in zip(found.items(), AGREE[args.dtype], strict=True):
        if not value <= limit:
            sys.exit(f"{name}: ours and transformers' are {value} apart, more than {limit}")
    return found


def kept_megabytes(model: torch.nn.Module, loss: Callable) -> float:
    """What the forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values()) / 1e6


def table(candidates: list[Candidate]) -> str:
    first = candidates[0]
    memory = "kept for backward, MB" if first.device == "cpu" else "memory of a step, MB"
    lines = [f"| {first.title} | ms per step | tokens/s | ours, same mode, takes | {memory} |"]
    lines.append("|---|---|---|---|---|")
    for one in candidates:
        middle = statistics.median(one.seconds)
        cells = [f"{1e3 * middle:.1f}", f"{one.tokens / middle:.0f}", ""]
        mine = [c for c in candidates if (c.owner, c.mode) == ("ours", one.mode)]
        if one.owner != "ours" and mine:
            ratios = (a / b for a, b in zip(mine[0].seconds, one.seconds, strict=True))
            cells[2] = f"{statistics.median(ratios):.2f} x"
        cells.append("" if one.megabytes is None else f"{one.megabytes:.0f}")
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save(args: argparse.Namespace, found: dict, agreed: dict, host: dict | None) -> None:
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    facts = {
        "command": command("python bench/training_step.py"),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": versions | {"python": platform.python_version()},
        "shape": {k: getattr(args, k) for k in ("layers", "batch", "seq", "dtype", "threads")},
        "ours and transformers apart by": agreed,
        "candidates": found,
    }
    if host is not None:
        facts["host microseconds: without gradients, forward, backward"] = host
    with whole_file(args.out) as out:
        out.write(json.dumps(facts, indent=1).encode())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def say(what: str) -> None:
    print(f"== {time.perf_counter() - STARTED:.0f} s: {what}", flush=True)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
