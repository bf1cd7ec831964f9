"""Prints what a process keeps in memory for a packed int8 model and 2048 tokens of int8 keys.

    python bench/resident.py

`resident`: bytes beyond those of the interpreter with the library imported; `needed`: bytes of the
weights and of the KV cache. The buffers of a step are part of the difference.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mobilellm_fast.engine import Engine

TOKENS = 2048


def resident_nbytes() -> int:
    """Return the bytes of this process that are in memory, files that it maps included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="default: SmolLM2-135M-Instruct")
    args = parser.parse_args()
    np.ones(1).sum()  # numpy's own first steps
    before = resident_nbytes()
    engine = Engine.load(args.source, format="int8", kv_format="int8")
    tokens = min(TOKENS, engine.config.context_length)
    cache = engine.new_cache()
    engine.forward([1 + i % 100 for i in range(tokens)], cache)
    found = {
        "resident": resident_nbytes() - before,
        "needed": engine.executor.weight_nbytes + cache.nbytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
