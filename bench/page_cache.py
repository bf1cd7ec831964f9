"""Compares decoding from an image in small and in huge pages of the page cache, in turns (Linux).

    python bench/page_cache.py model.mlf [--rounds 5]

Each round caches the image in small pages, and loads it three times, in processes of their own:
`small`, while this process has it mapped, so that it stays as it is; `mended`, when nobody has;
and `huge`, once more. Prints medians: milliseconds of the load and of a decode step, and MB of the
image in huge pages.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

STEPS = 300
PAGE = mmap.PAGESIZE


def cache_in_small_pages(path: Path) -> None:
    """Read a file anew, page by page, as the system does where something is cached already."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())  # what is not written yet cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in range(0, path.stat().st_size, PAGE):
            os.pread(file.fileno(), 1, place)


def load_and_decode(path: str) -> None:
    from mobilellm_fast.engine import Engine

    begin = perf_counter()
    engine = Engine.load(path)
    load = perf_counter() - begin
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    huge = next(int(line.split()[1]) for line in lines if line.startswith("FilePmdMapped:"))
    cache, steps = engine.new_cache(), []
    for i in range(STEPS):
        begin = perf_counter()
        engine.forward([1 + i % 100], cache)
        steps.append(perf_counter() - begin)
    print(json.dumps({"load": 1e3 * load, "step": 1e3 * median(steps), "huge": huge * 1024 / 1e6}))


def run(path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, str(path), "--worker"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        load_and_decode(args.image)
        return
    runs = {"small": [], "mended": [], "huge": []}
    for _ in range(args.rounds):
        cache_in_small_pages(args.image)
        with (
            args.image.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held,
        ):
            sum(held[place] for place in range(0, len(held), PAGE))
            runs["small"].append(run(args.image))
        runs["mended"].append(run(args.image))
        runs["huge"].append(run(args.image))
    for name, found in runs.items():
        print(name, {part: round(median(r[part] for r in found), 2) for part in found[0]})
    ratios = [a["step"] / b["step"] for a, b in zip(runs["small"], runs["huge"], strict=True)]
    print("step, small / huge:", [round(ratio, 3) for ratio in ratios])


if __name__ == "__main__":
    main()
