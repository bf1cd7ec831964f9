"""Times prompts and decoding of 125M with random weights, per kernel table and number of threads.

    python bench/cpu_device.py [--isas amx avx512vnni] [--threads 1 2 4] [--formats int8 int4 w8a8]

Tables take turns; a figure is the median of three rounds. Lines come as they are measured, so a run
that is cut short keeps what it did.
"""

import argparse
import statistics
from itertools import pairwise
from time import perf_counter

import machine
from engines import random_image, shape
from model_works import prefill, random_ids

from mobilellm_fast import _C
from mobilellm_fast.engine import Engine

ROUNDS = 3


def main() -> None:
    best = [isa for isa in _C.supported_isas() if isa in ("amx", "avx512vnni", "avxvnni", "avx2")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isas", nargs="+", default=best[:2])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--formats", nargs="+", default=["int8", "int4", "w8a8"])
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    for isa in args.isas:
        peaks = machine.peaks(1, isa)
        said = ", ".join(
            f"{name} {rate / 2e9:.0f} G multiply-adds/s" for name, rate in peaks.items()
        )
        print(f"{isa}: peak of one thread {said}", flush=True)
    print(
        "format threads | "
        + " | ".join(f"{isa}: prompt, batch of 16, decode tok/s" for isa in args.isas)
    )
    config = shape("125M")
    for format in args.formats:
        image = random_image(config, format, "125M")
        for threads in args.threads:
            if threads > machine.available_cpus() or (format != "int8" and threads not in (1, 8)):
                continue
            times = {
                isa: measure(config, image, format, threads, isa, args.tokens) for isa in args.isas
            }
            found = {isa: [] for isa in args.isas}
            for round in range(ROUNDS + 1):
                for isa, works in times.items():
                    figures = [work() for work in works]
                    if round:
                        found[isa].append(figures)
            cells = []
            for isa in args.isas:
                of_each = [statistics.median(each) for each in zip(*found[isa], strict=True)]
                prompt, together, token = of_each
                cells.append(f"{args.tokens / prompt:7.0f} {16 / together:7.0f} {1 / token:6.0f}")
            print(f"{format:5} {threads:2} | " + " | ".join(cells), flush=True)


def measure(config, image, format: str, threads: int, isa: str, tokens: int) -> list:
    """Return what times a prompt, a step of a batch of 16 and a step of one sequence."""
    engine = Engine(config, image.weights, format, name="125M", threads=threads, isa=isa)
    ids = random_ids(engine, 16)

    def steps(sequences: int, count: int) -> float:
        caches = [engine.new_cache() for _ in range(sequences)]
        times = [perf_counter()]
        for _ in range(count):
            engine.forward_batch([[token] for token in ids[:sequences]], caches)
            times.append(perf_counter())
        return statistics.median(after - before for before, after in pairwise(times))

    return [prefill(engine, tokens).run, lambda: steps(16, 4), lambda: steps(1, 16)]


if __name__ == "__main__":
    main()
