"""What is timed of an engine: prefill, decode, batches; and the least that each must take."""

import statistics
from time import perf_counter

import numpy as np
from timing import Work

from mobilellm_fast.config import expected_shapes
from mobilellm_fast.engine import Engine
from mobilellm_fast.quant import activation_of

STEPS = 16  # decoded per turn, whose median is the turn's figure


def random_ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    """Any ids take the same time; these are the same in every run."""
    return np.random.default_rng(seed).integers(engine.config.vocab_size, size=count).tolist()


def facts(engine: Engine) -> dict:
    """Describe an engine as a saved run does."""
    executor = engine.executor
    return {
        "format": engine.format,
        "isa": executor.isa,
        "threads": executor.threads,
        "parameters": executor.num_parameters,
        "weight_nbytes": executor.weight_nbytes,
        "bits_per_weight": 8 * executor.weight_nbytes / executor.num_parameters,
    }


def prefill(engine: Engine, tokens: int) -> Work:
    """Time a prompt from its ids to the logits after it; `seconds` are of all of it."""
    ids = random_ids(engine, tokens)

    def run() -> float:
        cache = engine.new_cache()
        started = perf_counter()
        engine.forward(ids, cache)
        return perf_counter() - started

    operations = prefill_operations(engine, tokens)
    peak = "fp32" if activation_of(engine.format) == "float" else "int8"
    own = {"tokens": tokens, "tokens_per_run": tokens, "operations": operations, "peak": peak}
    return Work(run, facts(engine) | own)


def decode(engine: Engine, context: int, steps: int = STEPS) -> Work:
    """Time single steps that follow a context; `seconds` are of one, the median of a turn."""
    ids = random_ids(engine, context + steps)
    cache = engine.new_cache()
    engine.forward(ids[:context], cache)

    def run() -> float:
        cache.truncate(context)
        times = [perf_counter()]
        for token_id in ids[context:]:
            engine.forward([token_id], cache)
            times.append(perf_counter())
        return statistics.median(np.diff(times).tolist())

    run()  # so that the cache has its pages
    nbytes = engine.executor.memory_nbytes_per_token + cache.nbytes
    own = {"tokens": 1, "tokens_per_run": steps, "context": context, "nbytes": nbytes}
    return Work(run, facts(engine) | own)


def generate_batch(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> list:
    """Generate for several prompts at once. The one place that knows how a batch is asked for."""
    return engine.generate(prompts, max_new_tokens=max_new_tokens)


def batch(engine: Engine, sequences: int, context: int, steps: int = STEPS) -> Work:
    """Time decoding several sequences together; `seconds` are of one step of all of them.

    A step's time is what `steps` more tokens take, so the prompts do not count.
    """
    prompts = [random_ids(engine, context, seed) for seed in range(sequences)]
    generate_batch(engine, [prompt[:4] for prompt in prompts], 2)

    def run() -> float:
        times = []
        for count in (1, 1 + steps):
            started = perf_counter()
            generate_batch(engine, prompts, count)
            times.append(perf_counter() - started)
        return (times[1] - times[0]) / steps

    own = {"tokens": sequences, "tokens_per_run": sequences * (steps + 2), "context": context}
    return Work(run, facts(engine) | own)


def prefill_operations(engine: Engine, tokens: int) -> int:
    """Count operations of a prompt: matrices of all positions, attention, the head once."""
    config = engine.config
    shapes = expected_shapes(config)
    block = sum(
        size[0] * size[1]
        for name, size in shapes.items()
        if name.startswith("model.layers.0.") and len(size) == 2
    )
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * pairs * config.num_attention_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    return 2 * (len(config.schedule) * (tokens * block + attention) + head)
