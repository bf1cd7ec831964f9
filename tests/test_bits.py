"""The bits of the executor's logits are the same on every machine: stored checksums. No torch."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mobilellm_fast import _C, quant
from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import KV_FORMATS, Executor

STORED = Path(__file__).with_name("bits.json")
CASES = [
    *((format, "int16") for format in quant.FORMATS),
    *(("int8", kv_format) for kv_format in KV_FORMATS if kv_format != "int16"),
]
# Widths that are no multiple of a group or tile, more than one block of groups, shared layers.
CONFIG = MobileLLMConfig(
    vocab_size=161,
    hidden_size=90,
    intermediate_size=1100,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=18,
    max_position_embeddings=256,
    layer_sharing="immediate",
)


def weights(format: str) -> dict:
    """Random numbers made of integers: the same bits wherever they are made."""
    rng = np.random.default_rng(5)
    made = {}
    for name, shape in expected_shapes(CONFIG).items():
        values = rng.integers(-1000, 1001, shape).astype(np.float32) / np.float32(1024)
        if len(shape) == 1:
            made[name] = values + np.float32(1)
        else:
            spread = np.float32(2 ** -np.floor(np.log2(shape[1]) / 2))
            made[name] = quant.pack(values * spread, quant.kind_of(format, name, "float32"))
    return made


def checksum(format: str, kv_format: str, isa: str) -> str:
    """Logits of a prompt of 139 tokens, of steps after it, and of a batch, as one hash."""
    executor = Executor(CONFIG, weights(format), format, threads=2, isa=isa, kv_format=kv_format)
    ids = np.random.default_rng(6).integers(0, CONFIG.vocab_size, 150)
    caches = [executor.new_cache() for _ in range(3)]
    digest = hashlib.sha256()
    for part in (ids[:139], ids[139:141], ids[141:142]):  # beyond a page of 128
        digest.update(executor.forward(part, caches[0], all_logits=True).tobytes())
    for _ in range(2):
        digest.update(executor.forward_batch([ids[:1], ids[1:9], ids[9:10]], caches).tobytes())
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize(("format", "kv_format"), CASES)
def test_logits_have_the_stored_bits(format, kv_format, isa):
    assert (
        checksum(format, kv_format, isa) == json.loads(STORED.read_text())[f"{format} {kv_format}"]
    )


def test_dispatch_selects_the_expected_table():
    best = os.environ.get("MLF_ISA") or _C.supported_isas()[0]
    expected = os.environ.get("MLF_EXPECTED_ISA", best)  # set where a processor is emulated
    assert Executor(CONFIG, weights("int8"), "int8").isa == expected


def test_tables_that_cannot_run_are_refused():
    unsupported = set(_C.compiled_isas()) - set(_C.supported_isas())
    for isa in unsupported:
        with pytest.raises(MobileLLMError, match=f"{isa}.*cannot run"):
            Executor(CONFIG, weights("int8"), "int8", isa=isa)


if __name__ == "__main__":  # store them: python tests/test_bits.py
    made = {f"{case[0]} {case[1]}": checksum(*case, "scalar") for case in CASES}
    STORED.write_text(json.dumps(made, indent=1) + "\n")
