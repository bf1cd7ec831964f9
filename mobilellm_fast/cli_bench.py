"""What `mobilellm-fast bench` measures and prints."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from .batch import MAX_PROMPTS
from .errors import MobileLLMError
from .sampling import check_integer

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Plan:
    """What to measure: prefill of each prompt length, decode of each answer length.

    `batch` sequences are computed together; speeds are those of all of them.

    Raises:
        MobileLLMError: a length, the batch or the number of repetitions is below 1, the batch
            above 64, or nothing is left to do.
    """

    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    repetitions: int
    batch: int = 1

    def __post_init__(self) -> None:
        if check_integer("[bench] batch", self.batch, at_least=1) > MAX_PROMPTS:
            raise MobileLLMError(f"[bench] batch must be at most {MAX_PROMPTS}, got {self.batch}")
        check_integer("[bench] repetitions", self.repetitions, at_least=1)
        for name in ("prompt_tokens", "new_tokens"):
            for count in getattr(self, name):
                check_integer(f"[bench] {name}", count, at_least=1)
        if not (*self.prompt_tokens, *self.new_tokens):
            raise MobileLLMError("[bench] prompt_tokens or new_tokens must be given, got neither")


@dataclass(frozen=True)
class Row:
    """One measurement, with what is needed to understand it a year later.

    `test` is "pp<tokens>" (prefill) or "tg<tokens>" (decode), as llama-bench names them, with
    "x<batch>" behind it where several sequences are computed together; speeds are tokens/s, mean
    and standard deviation over the repetitions. `read_share` is the part of the machine's read
    bandwidth (bytes/s, measured in this run with as many threads) that decode uses if each step
    reads all weights once; None for prefill, which is bound by arithmetic.
    """

    model: str
    parameters: int
    weight_bytes: int
    format: str
    kv_format: str
    isa: str
    threads: int
    test: str
    tokens_per_s: float
    tokens_per_s_std: float
    read_bandwidth: float
    read_share: float | None


def measure(engine: Engine, plan: Plan) -> list[Row]:
    """Run a plan; the first repetition of each test only warms up and is not counted.

    Raises:
        MobileLLMError: a length is beyond the model's context.
    """
    import numpy as np

    from ._C import read_bandwidth

    limit = engine.config.context_length
    longest = max((*plan.prompt_tokens, *plan.new_tokens))
    if longest > limit:
        raise MobileLLMError(f"[bench] lengths must be within the context, {limit}, got {longest}")
    # Any ids take the same time; these are the same in every run.
    ids = np.random.default_rng(0).integers(engine.config.vocab_size, size=longest).tolist()

    batch = plan.batch

    def prefill(count: int) -> None:
        engine.forward_batch([ids[:count]] * batch, [engine.new_cache() for _ in range(batch)])

    def decode(count: int) -> None:
        caches = [engine.new_cache() for _ in range(batch)]
        for token_id in ids[:count]:
            engine.forward_batch([[token_id]] * batch, caches)

    executor = engine.executor
    bandwidth = read_bandwidth(executor.threads)

    def row(test: str, work: Callable[[int], None], count: int) -> Row:
        speeds = [batch * speed for speed in _speeds(work, count, plan.repetitions)]
        mean = statistics.fmean(speeds)
        return Row(
            model=engine.name,
            parameters=executor.num_parameters,
            weight_bytes=executor.weight_nbytes,
            format=engine.format,
            kv_format=executor.kv_format,
            isa=executor.isa,
            threads=executor.threads,
            test=f"{test}{count}" + (f"x{batch}" if batch > 1 else ""),
            tokens_per_s=mean,
            tokens_per_s_std=statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
            read_bandwidth=bandwidth,
            read_share=executor.memory_nbytes_per_token * mean / batch / bandwidth
            if work is decode
            else None,
        )

    return [row("pp", prefill, count) for count in plan.prompt_tokens] + [
        row("tg", decode, count) for count in plan.new_tokens
    ]


def _speeds(work: Callable[[int], None], count: int, repetitions: int) -> Iterator[float]:
    work(count)
    for _ in range(repetitions):
        started = perf_counter()
        work(count)
        yield count / (perf_counter() - started)


def print_rows(rows: list[Row], output: str | None) -> None:
    """Print rows as "json", "csv" or "md"; None is a table on a terminal and "md" elsewhere."""
    if output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    elif output == "md" or not sys.stdout.isatty():
        header = list(_cells(rows[0]))
        for line in (header, ["---"] * len(header), *(_cells(row).values() for row in rows)):
            print("|", " | ".join(line), "|")
    else:
        _print_table(rows)


def _cells(row: Row) -> dict[str, str]:
    return {
        "model": row.model,
        "size": f"{row.weight_bytes / 1e6:.1f} MB",
        "params": f"{row.parameters / 1e6:.1f} M",
        "format": row.format,
        "KV": row.kv_format,
        "isa": row.isa,
        "threads": f"{row.threads}",
        "test": row.test,
        "tokens/s": f"{row.tokens_per_s:.2f} ± {row.tokens_per_s_std:.2f}",
        "of read bandwidth": ""
        if row.read_share is None
        else f"{row.read_share:.0%} of {row.read_bandwidth / 1e9:.1f} GB/s",
    }


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_cells(rows[0]))
    for row in rows:
        table.add_row(*_cells(row).values())
    Console(markup=False).print(table)
