"""The tier `ring` on a GPU against `pdl`: shapes of a real width, every kind of weights and plan of
attention."""

import dataclasses

import pytest
import torch
from interpreted import HAS_GPU

pytest.importorskip("triton")

from random_cuda_weights import random_cuda_cache, random_cuda_weights

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda.executor import CudaExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]

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
    cache = random_cuda_cache(executor, context, STEPS)
    found = []
    for _ in range(2):
        cache.length = context
        tokens, _ = executor.decode(cache, 5, STEPS)
        kept = cache.data[..., : cache.length, :].float().clone()
        found.append((tokens, executor._steps.logits.clone(), kept))
    return found


# Of integer weights the inputs have 16 bits, see tests/test_ring.py.
@pytest.mark.parametrize("finishers", [0, 1])
@pytest.mark.parametrize("kind, bound", [("bf16", 1.5e-4), ("int8", 5e-4), ("int4", 1e-3)])
def test_the_ring_equals_pdl(kind, bound, finishers):
    weights = random_cuda_weights(CONFIG, kind)
    oracle = CudaExecutor(CONFIG, weights, "pdl", "fp16")
    ours = CudaExecutor(CONFIG, weights, "ring", "fp16", finishers=finishers)
    for context in (0, 100, 700, 2500):
        (want, expected, wanted), _ = decoded(oracle, context)
        (tokens, logits, kept), again = decoded(ours, context)
        assert again[0] == tokens and torch.equal(again[1], logits)
        assert tokens == want, context
        # A new key or value is rounded to 11 bits, some to the other side than pdl's: where there
        # are few others, the logits show it (up to 3.5e-4 measured, 1.5B in int4).
        allowed = max(bound, 1e-3) if context == 0 else bound
        assert (logits - expected).norm() <= allowed * expected.norm(), f"{context} tokens"
        assert (kept - wanted).abs().max() <= 0.02
