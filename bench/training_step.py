"""Times and weighs a training step beside the same model in transformers, eager and compiled.

    python bench/training_step.py                      # 4 layers of MobileLLM-125M's width
    python bench/training_step.py --device cuda --dtype bf16 --layers 30 --batch 8 --seq 1024

Forward, loss, backward and AdamW, on the same tokens. The candidates take turns, step by step, so
that what else the machine does meets them alike; medians, and medians of the ratios of each round.
"""

import argparse
import dataclasses
import statistics
import time

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mobilellm_fast import MobileLLM, MobileLLMConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = dataclasses.replace(
        MobileLLMConfig.preset("MobileLLM-125M"), num_hidden_layers=args.layers
    )
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), device=args.device)
    steps = {}
    for mode in args.modes:
        for name in (f"ours, {mode}", f"transformers, {mode}"):
            steps[name] = step_of(name, config, dtype, args.device, ids)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            synchronize(args.device)
            started = time.perf_counter()
            step()
            synchronize(args.device)
            times[name].append(time.perf_counter() - started)
    kept = {name: kept_megabytes(name, config, dtype, args.device, ids) for name in steps}
    tokens = ids.numel()
    title = f"{args.layers} layers, {args.batch} x {args.seq} tokens, {args.dtype}, {args.device}"
    print(f"| {title} | ms per step | tokens/s | ours, same mode, takes | kept for backward, MB |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        other = times[name.replace("transformers", "ours")]
        ratio = statistics.median(a / b for a, b in zip(other, seconds, strict=True))
        middle = statistics.median(seconds)
        cells = f"{1e3 * middle:.0f}", f"{tokens / middle:.0f}", f"{ratio:.2f} x", kept[name]
        print(f"| {name} | {' | '.join(cells)} |")


def step_of(name, config, dtype, device, ids):
    """Return a function that does one step, warmed up."""
    model, run = model_of(name, config, dtype, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        loss_of(name, run, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return step


def model_of(name, config, dtype, device):
    if name.startswith("ours"):
        model = MobileLLM(config, dtype=dtype, device=device)
    else:
        model = LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).to(device, dtype)
    return model, torch.compile(model) if name.endswith("compiled") else model


def loss_of(name, run, ids):
    return run(ids, ids) if name.startswith("ours") else run(ids, labels=ids, use_cache=False).loss


def kept_megabytes(name, config, dtype, device, ids) -> str:
    """What the forward pass keeps for the backward pass, parameters aside; eager only."""
    if name.endswith("compiled"):
        return ""
    model, run = model_of(name, config, dtype, device)
    parameters = {p.data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(name, run, ids)
    return f"{sum(seen.values()) / 1e6:.0f}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
