"""The tier `ring` on a GPU against `pdl`: shapes of a real width, every kind of weights and plan of
attention, and the variants of its kernel that are still to be timed."""

import dataclasses

import pytest
import torch
from interpreted import HAS_GPU

pytest.importorskip("triton")

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda.executor import CudaExecutor
from mobilellm_fast.cuda.weights import CudaWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]

TILES = {"RING_TILES": 128, "RING_DEPTH": 4}
WAITS = {"RING_EARLY": 1, "RING_WIDE_WORDS": 1, "RING_PAUSE": 40}
VARIANTS = {
    "base": {},
    "tiles": TILES,
    "tiles-waits": TILES | WAITS,
    "tiles-waits-later": TILES | WAITS | {"RING_LAST_LATER": 1},
    "slices-waits": TILES | WAITS | {"RING_SLICES": 1},
    "slices-64": TILES | {"RING_SLICES": 1, "RING_TILES": 64, "RING_DEPTH": 6},
    "tiles-256": TILES | {"RING_TILES": 256, "RING_DEPTH": 2},
    "tiles-8-warps": TILES | {"WARPS": 8, "THREADS": 256, "RING_DEPTH": 8},
    "bulk": {"RING_BULK": 1},
    "chunks": {"RING_CHUNKS": 2, "RING_MASKED_OR": 1},
    "waits": WAITS | {"RING_LAST_LATER": 1},
}
CONFIG = dataclasses.replace(
    MobileLLMConfig.preset("MobileLLM-600M"),
    num_hidden_layers=3,
    layer_sharing="immediate",
    vocab_size=4096,
    max_position_embeddings=4096,
    eos_token_id=None,
)
STEPS = 6


def decoded(executor, context):
    """Tokens, logits of the last step, and the cache, twice."""
    cache = executor.new_cache()
    cache.reserve(context + STEPS)
    cache.data.normal_(generator=torch.Generator("cuda").manual_seed(1))
    found = []
    for _ in range(2):
        cache.length = context
        tokens, _ = executor.decode(cache, 5, STEPS)
        kept = cache.data[..., : cache.length, :].float().clone()
        found.append((tokens, executor._steps.logits.clone(), kept))
    return found


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_pdl(name, kind):
    weights = CudaWeights.random(CONFIG, kind)
    oracle = CudaExecutor(CONFIG, weights, "pdl", "fp16")
    ours = CudaExecutor(CONFIG, weights, "ring", "fp16", constants=VARIANTS[name])
    for context in (0, 100, 700, 2500):
        (want, expected, wanted), _ = decoded(oracle, context)
        (tokens, logits, kept), again = decoded(ours, context)
        assert again[0] == tokens and torch.equal(again[1], logits)
        assert tokens == want, context
        # as measured of `ring` on an H100; halves of keys may be rounded to the other side
        assert (logits - expected).norm() <= 1.5e-4 * expected.norm(), (
            f"{context} tokens of context"
        )
        assert (kept - wanted).abs().max() <= 0.02
