"""Several sequences in one step of the executor."""

import numpy as np
import pytest
from helpers import make_executor, random_ids, run, tiny_config

from mobilellm_fast import quant


@pytest.mark.parametrize("format", quant.FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_has_the_bits_of_its_sequences(format, threads):
    """Prompts and single tokens together, across pages, chunks and both ways to share work."""
    config = tiny_config(max_position_embeddings=1024, layer_sharing="immediate")
    executor = make_executor(config, format, threads=threads)
    rng = np.random.default_rng(0)
    for lengths in ([1], [1] * 64, [127, 1, 129], [300, 5, 1, 20], rng.integers(1, 40, 64)):
        sequences = [random_ids(config, n, seed=i) for i, n in enumerate(lengths)]
        want = [run(executor, ids) for ids in sequences]
        caches = [executor.new_cache() for _ in sequences]
        got = executor.forward_batch(sequences, caches, all_logits=True)
        assert np.array_equal(got, np.concatenate(want))
        assert [cache.length for cache in caches] == list(lengths)
        # The same in pieces: beginnings of any length, then 1 to 19 tokens of each that is left.
        caches = [executor.new_cache() for _ in sequences]
        steps = rng.integers(1, 20, len(sequences))
        parts = [ids[: rng.integers(1, len(ids) + 1)] for ids in sequences]
        left = range(len(sequences))
        while left:
            got = executor.forward_batch(parts, [caches[i] for i in left])
            for row, i in zip(got, left, strict=True):
                assert np.array_equal(row, want[i][caches[i].length - 1])
            left = [i for i in left if caches[i].length < len(sequences[i])]
            parts = [sequences[i][caches[i].length :][: steps[i]] for i in left]


def test_decode_of_ragged_batches_has_the_bits_of_single_steps():
    config = tiny_config(max_position_embeddings=1024)
    want = None
    for threads in (1, 2, 5):
        executor = make_executor(config, "int8", threads=threads)
        prompts = [random_ids(config, n, seed=n) for n in range(1, 640, 10)]
        caches = [executor.new_cache() for _ in prompts]
        logits = [executor.forward_batch(prompts, caches)]
        for _ in range(4):
            picked = logits[-1].argmax(axis=1)
            logits.append(executor.forward_batch(picked[:, None], caches))
        if want is None:
            want = logits
            cache = executor.new_cache()
            alone = [executor.forward(prompts[40], cache)]
            for _ in range(4):
                alone.append(executor.forward([int(alone[-1].argmax())], cache))
            assert np.array_equal(np.stack(alone)[:, 0], np.stack(logits)[:, 40])
        assert np.array_equal(logits, want)
