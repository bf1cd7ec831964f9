"""One start of an engine in a process of its own: prints a JSON line of seconds and bytes.

    python start_worker.py ours model.mlf
    python start_worker.py ours default --format int4
    python start_worker.py transformers folder

`import`: of the library; `load`: from files to weights in memory; `first_token`: the prompt after
that; `init`: what the first steps take more than later ones, beside what making the executor takes;
`execute`: a later step; `peak_nbytes`: of the process.
"""

import json
import statistics
import sys
from argparse import ArgumentParser
from itertools import pairwise
from time import perf_counter

PROMPT = [1, 2, 3, 4]
STEPS = 16


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("engine", choices=("ours", "transformers"))
    parser.add_argument("source")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=1, help="of each block, for transformers")
    args = parser.parse_args()
    times = [perf_counter()]
    prompt_step = {"ours": ours, "transformers": hugging_face}[args.engine](args, times)
    times.append(perf_counter())
    token = prompt_step(PROMPT)
    times.append(perf_counter())
    print("first token", flush=True)  # the parent takes the time
    steps = [perf_counter()]
    for _ in range(STEPS):
        token = prompt_step([token])
        steps.append(perf_counter())
    imported, loaded, made, first = (after - before for before, after in pairwise(times))
    taken = [after - before for before, after in pairwise(steps)]
    execute = statistics.median(taken)
    facts = {
        "import": imported,
        "load": loaded,
        "first_token": made + first,
        "init": made + max(0.0, first + taken[0] - 2 * execute),
        "execute": execute,
        "peak_nbytes": peak_nbytes(),
    }
    print(json.dumps(facts))


def ours(args, times: list[float]):
    """Load our engine; returns a function from tokens to the next one."""
    from mobilellm_fast.engine import Engine
    from mobilellm_fast.packing import load_image

    times.append(perf_counter())
    source = None if args.source == "default" else args.source
    image = load_image(source, args.format, threads=args.threads)
    times.append(perf_counter())
    engine = Engine(image.config, image.weights, image.format, threads=args.threads)
    cache = engine.new_cache()
    return lambda tokens: int(engine.forward(tokens, cache)[-1].argmax())


def hugging_face(args, times: list[float]):
    """Load transformers, float32; blocks repeat as `--repeats` says, each with a KV cache."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    times.append(perf_counter())
    model = LlamaForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    share_layers(model, args.repeats)
    times.append(perf_counter())
    cache = DynamicCache(config=model.config)

    def step(tokens: list[int]) -> int:
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return step


def share_layers(model, repeats: int) -> None:
    """Run each block of a transformers model several times in a row, with a cache slot per run.

    Every run is a copy of the block that has its own index and the same weights.
    """
    import copy

    layers = []
    for layer in model.model.layers:
        for _ in range(repeats):
            run = copy.copy(layer)
            run._modules = dict(layer._modules)
            run.self_attn = copy.copy(layer.self_attn)
            run.self_attn.layer_idx = len(layers)
            layers.append(run)
    model.model.layers = type(model.model.layers)(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = ["full_attention"] * len(layers)


def peak_nbytes() -> int:
    """Return the most memory that this process ever had, in bytes."""
    try:
        lines = open("/proc/self/status").read().splitlines()  # noqa: SIM115
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
