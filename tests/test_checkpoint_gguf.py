"""GGUF files: what is read, against transformers and the gguf package, and what is refused."""

import dataclasses
import math
import struct
import tracemalloc
from pathlib import Path

import checkpoint_files
import numpy as np
import pytest
from checkpoint_files import assert_same, damaged, gguf_name, read_all, values_of, write_gguf
from gguf_by_transformers import read_by_transformers
from helpers import MODEL_CONFIGS, random_weights, tiny_config

pytest.importorskip("gguf")
import gguf

from mobilellm_fast.checkpoint import open_checkpoint
from mobilellm_fast.checkpoint.default_model import default_model
from mobilellm_fast.checkpoint.gguf_blocks import can_decode
from mobilellm_fast.checkpoint.gguf_file import read_gguf
from mobilellm_fast.errors import CheckpointError
from mobilellm_fast.rope import inverse_frequencies

# widths that are multiples of 32, the smallest block
CONFIG = tiny_config(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
WEIGHTS = random_weights(CONFIG)
# and of 256, the largest
WIDE = tiny_config(
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=256,
    num_hidden_layers=1,
)
BLOCK_TYPES = [
    kind.name
    for kind in gguf.GGMLQuantizationType
    if can_decode(kind.name) and kind.name not in ("F32", "F16", "BF16")
]


def error_of(path: Path) -> str:
    """The one line that says why a file is refused; it names the file once."""
    message = checkpoint_files.error_of(path)
    assert message.count(str(path)) == 1
    return message


def transformers_weights(path: Path) -> dict[str, np.ndarray]:
    """What transformers reads from the file, by its own names and with its own permutation."""
    return {name: tensor.numpy() for name, tensor in read_by_transformers(path)["tensors"].items()}


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_types_equal_transformers(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, matrices=kind)
    assert_same(read_all(path), transformers_weights(path))
    if kind == "F32":  # so the permutation of our own writer was undone
        assert_same(read_all(path), WEIGHTS)
    stored = {"F16": "float16", "BF16": "bfloat16", "Q8_0": "int8"}
    stored |= {"Q4_0": "int4_sym", "Q4_1": "int4"}
    assert open_checkpoint(path).dtype == stored.get(kind, "float32")


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes (rows, bytes per row) of a type that decode to finite numbers."""
    size = gguf.quants.quant_shape_to_byte_shape((rows, cols), gguf.GGMLQuantizationType[kind])
    blocks = rng.integers(0, 256, size, np.uint8)
    for _ in range(50):
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        bad = ~np.isfinite(values).all(axis=1)
        if not bad.any():
            return blocks
        # fewer bits set in the bytes of a bad row make infinite scales less likely
        blocks[bad] = rng.integers(0, 120, (bad.sum(), size[1]), np.uint8)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_block_type(tmp_path, kind):
    """Random blocks of each type the gguf package knows, in matrices that are permuted or not."""
    rng = np.random.default_rng(0)
    weights = random_weights(WIDE)
    blocks = {
        gguf_name(name): (kind, random_blocks(kind, *values.shape, rng))
        for name, values in weights.items()
        if values.ndim == 2
    }
    path = write_gguf(tmp_path / "m.gguf", WIDE, weights, tensors=blocks)
    got, want = read_all(path), transformers_weights(path)
    for name in weights:
        np.testing.assert_array_equal(values_of(got[name]), want[name], err_msg=name)


def test_all_families_of_types_were_tried():
    assert {"Q4_K", "Q6_K", "IQ2_XXS", "IQ4_NL", "IQ4_XS", "TQ1_0", "Q5_1"} <= set(BLOCK_TYPES)


def scalar_grid(kind: str, block: bytes) -> tuple[float, float, list[int]]:
    """Decode one block as the format's description says: scale, minimum, 32 codes."""
    scale = np.frombuffer(block[:2], np.float16)[0]
    if kind == "Q8_0":
        return scale, 0, list(struct.unpack("32b", block[2:]))
    nibbles = block[-16:]
    codes = [byte % 16 for byte in nibbles] + [byte // 16 for byte in nibbles]
    if kind == "Q4_0":
        return scale, float(scale) * -8, codes
    return scale, np.frombuffer(block[2:4], np.float16)[0], codes


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_grids_are_kept_bit_for_bit(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, matrices=kind)
    name = "model.layers.0.mlp.down_proj.weight"  # (64, 96), not permuted
    tensor = open_checkpoint(path).read(name)
    kinds = {"Q4_0": "int4_sym_g32", "Q4_1": "int4_g32", "Q8_0": "int8_g32"}
    assert tensor.kind == kinds[kind]
    assert tensor.scales.dtype == np.float16
    stored = gguf.quants.quantize(WEIGHTS[name], gguf.GGMLQuantizationType[kind])
    blocks = stored.reshape(64, 3, -1)
    for row in range(64):
        for group in range(3):
            scale, low, codes = scalar_grid(kind, blocks[row, group].tobytes())
            assert tensor.scales[row, group] == scale
            assert tensor.codes[row, group * 32 : group * 32 + 32].tolist() == codes
            if kind != "Q8_0":
                assert tensor.minimums[row, group] == low
    assert tensor.codes.min() >= (-127 if kind == "Q8_0" else 0)


def test_reading_holds_one_tensor(tmp_path):
    config = dataclasses.replace(WIDE, vocab_size=8000)
    weights = random_weights(config)
    blocks = random_blocks("Q6_K", 8000, 256, np.random.default_rng(0))
    tensors = {"token_embd.weight": ("Q6_K", blocks)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights, tensors=tensors))
    tracemalloc.start()
    try:
        for name in checkpoint.names:
            checkpoint.read(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * 8000 * 256 * 4 + (8 << 20)


@pytest.mark.model
def test_default_model_equals_transformers(default_model_by_transformers):
    theirs = default_model_by_transformers["tensors"]
    assert_same(read_all(default_model()), {name: t.numpy() for name, t in theirs.items()})


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, c in MODEL_CONFIGS.items() if not c.rope_scaling])
def test_configuration(tmp_path, name):
    config = MODEL_CONFIGS[name]
    path = write_gguf(
        tmp_path / "m.gguf",
        config,
        random_weights(config),
        metadata={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2},
    )
    stored = {  # the file has these in single precision
        name: float(np.float32(getattr(config, name))) for name in ("rms_norm_eps", "rope_theta")
    }
    assert open_checkpoint(path).config == dataclasses.replace(config, **stored)


@pytest.mark.parametrize("name", ["m.GGUF", "sha256-0123", "m.bin"])
def test_a_file_of_another_name(tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS).rename(tmp_path / name)
    assert open_checkpoint(path).config == open_checkpoint(path.rename(tmp_path / "m.gguf")).config


def test_defaults_where_a_file_is_silent(tmp_path):
    silent = ["attention.key_length", "attention.value_length", "attention.head_count_kv"]
    silent += ["rope.dimension_count", "rope.freq_base", "vocab_size"]
    config = dataclasses.replace(CONFIG, num_key_value_heads=4)
    weights = random_weights(config)
    metadata = {f"llama.{key}": None for key in silent}
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights, metadata=metadata))
    assert opened.config == dataclasses.replace(
        config, rms_norm_eps=float(np.float32(1e-5)), bos_token_id=None, eos_token_id=None
    )
    assert opened.name == "m"
    assert opened.tokenizer is None


def test_tokens_and_template(tmp_path):
    metadata = {
        "tokenizer.chat_template": "{{ x }}",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["t", "0", *(f"t{i}" for i in range(95))],
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
    }
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, metadata=metadata))
    assert opened.chat_template == "{{ x }}"
    assert opened.config.eos_token_id == opened.tokenizer.eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scale_linear": 1.0}, None),
    ],
)
def test_linear_rope_scaling(tmp_path, metadata, scaling):
    fields = {f"llama.{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, metadata=fields)
    want = {"rope_type": "linear", "factor": scaling} if scaling else None
    assert open_checkpoint(path).config.rope_scaling == want


def llama3_divisors(theta: float, head_dim: int, factor: float, trained: int = 8192) -> np.ndarray:
    """The tensor that llama.cpp's converter writes for "llama3" scaling, one number at a time."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < trained / 4:
            divisors.append(1.0)
        elif wavelength > trained:
            divisors.append(factor)
        else:
            smooth = (trained / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling(tmp_path, factor):
    config = tiny_config(head_dim=64, rope_theta=500000.0, max_position_embeddings=131072)
    divisors = llama3_divisors(500000.0, 64, factor)
    assert len(set(divisors)) > 3  # short, long, and blended ones
    path = write_gguf(
        tmp_path / "m.gguf", config, random_weights(config), tensors={"rope_freqs.weight": divisors}
    )
    opened = open_checkpoint(path).config
    assert opened.rope_scaling["rope_type"] == "llama3"
    np.testing.assert_allclose(
        inverse_frequencies(opened), inverse_frequencies(config) / divisors, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (llama3_divisors(500000.0, 64, 8.0, trained=4096), "does not hold the divisors"),
        (np.linspace(1, 4, 32).astype(np.float32), "does not hold the divisors"),
        (np.ones(31, np.float32), "unsupported form"),
        (np.full(32, np.nan, np.float32), "factor"),
        (np.zeros(32, np.float32), "factor"),
    ],
)
def test_other_rope_divisors_are_refused(tmp_path, divisors, message):
    config = tiny_config(head_dim=64, rope_theta=500000.0)
    tensors = {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), tensors=tensors)
    assert message in error_of(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma2"}, "general.architecture must be 'llama', got 'gemma2'"),
        ({"llama.block_count": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"llama.block_count": 1}, "model.layers.1.input_layernorm.weight is not part"),
        ({"llama.block_count": 2**32 - 1}, "num_hidden_layers must be at most"),
        ({"llama.block_count": None}, "llama.block_count must be a positive integer"),
        ({"llama.block_count": 2.0}, "llama.block_count must be of type int, got 2.0"),
        ({"llama.embedding_length": 32}, "must have shape"),
        ({"llama.feed_forward_length": 95}, "must have shape (95, 64), got (96, 64)"),
        ({"llama.attention.head_count": 3}, "num_attention_heads must be a multiple"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be a positive"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv must be of type int"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length must equal the head"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count must equal the head size"),
        (
            {"llama.vocab_size": 96},
            "llama.vocab_size must equal the rows of token_embd.weight (97)",
        ),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "rms_norm_eps"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_norm_eps"),
        ({"llama.rope.freq_base": 0.0}, "rope_theta"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor = 2.0"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False is not supported"),
        ({"llama.from_the_future": "x"}, "llama.from_the_future = 'x' is not supported"),
        ({"split.count": 2}, "split.count"),
        ({"tokenizer.ggml.eos_token_id": 97}, "eos_token_id"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template must be of type str"),
    ],
)
def test_unsupported_metadata(tmp_path, metadata, message):
    path = tmp_path / "m.gguf"
    if "general.architecture" in metadata:  # the writer has set it already
        data = write_gguf(path, CONFIG, WEIGHTS).read_bytes()
        path.write_bytes(
            data.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 6) + b"gemma2", 1)
        )
    else:
        write_gguf(path, CONFIG, WEIGHTS, metadata=metadata)
    assert message in error_of(path)


def test_values_that_leave_the_computation_alone(tmp_path):
    metadata = {"llama.expert_count": 0, "llama.logit_scale": 1.0, "general.anything": "x"}
    open_checkpoint(write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, metadata=metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"output_norm.weight": np.ones(63)}, "model.norm.weight must have shape (64,), got (63,)"),
        ({"output_norm.weight": np.full(64, np.nan)}, "model.norm.weight must be finite"),
        ({"blk.0.attn_q.bias": np.ones(64)}, "tensor blk.0.attn_q.bias is not part of this model"),
        ({"blk.2.attn_q.weight": np.ones((64, 64))}, "model.layers.2.self_attn.q_proj.weight is"),
        ({"blk.00.attn_q.weight": np.ones((64, 64))}, "blk.00.attn_q.weight is not part"),
        ({"attn_q.weight": np.ones((64, 64))}, "tensor attn_q.weight is not part"),
        ({"blk.0.output.weight": np.ones((97, 64))}, "blk.0.output.weight is not part"),
        ({"output.weight": np.ones((96, 64))}, "lm_head.weight must have shape (97, 64)"),
        (
            {"output_norm.weight": ("I32", np.ones(64, np.int32))},
            "output_norm.weight is of type I32, which holds no weights",
        ),
    ],
)
def test_wrong_tensors(tmp_path, tensors, message):
    assert message in error_of(write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, tensors=tensors))


def test_missing_embedding(tmp_path):
    weights = {k: v for k, v in WEIGHTS.items() if k != "model.embed_tokens.weight"}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, weights)
    assert "token_embd.weight is missing" in error_of(path)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("kind", "place"),  # 1 is the minimum of Q4_1 and Q4_K
    [("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 1), ("Q8_0", 0), ("Q4_K", 1), ("Q5_0", 0), ("F16", 7)],
)
def test_scales_that_are_not_finite(tmp_path, kind, place, value):
    rng = np.random.default_rng(0)
    weights = random_weights(WIDE)
    if kind == "F16":
        blocks = rng.normal(size=(256, 256)).astype(np.float16)
    else:
        blocks = random_blocks(kind, 256, 256, rng)
    blocks[100].view(np.float16)[place] = value
    tensors = {"blk.0.ffn_down.weight": (kind, blocks)}
    path = write_gguf(tmp_path / "m.gguf", WIDE, weights, tensors=tensors)
    assert "model.layers.0.mlp.down_proj.weight must be finite" in error_of(path)


# --- the container -------------------------------------------------------------------------------


def string(text: bytes | str) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def field(key: bytes | str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return string(name) + packed


def container(
    fields: list[bytes] = (),
    infos: list[bytes] = (),
    data: int = 256,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counts = counts or (len(infos), len(fields))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32 + data)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


HUGE = 2**64 - 1


def test_a_sound_container(tmp_path):
    fields = [
        field("a", 4, u32(7)),
        field("b", 8, string("x")),
        field("c", 9, array(8, 1, string("y"))),
    ]
    fields += [field("d", 9, array(5, 2, struct.pack("<ii", -1, 2))), field("e", 7, b"\1")]
    fields += [field("f", 12, struct.pack("<d", 0.5)), field("g", 10, struct.pack("<Q", HUGE))]
    infos = [info("t", [4, 2]), info("u", [32], 8, 32)]
    for version in (2, 3):
        (tmp_path / "m.gguf").write_bytes(container(fields, infos, version=version))
        file = read_gguf(tmp_path / "m.gguf")
        assert file.metadata.pop("d").tolist() == [-1, 2]
        assert file.metadata == {"a": 7, "b": "x", "c": ["y"], "e": True, "f": 0.5, "g": HUGE}
        (t, u) = file.tensors.values()
        assert (t.shape, t.type, t.nbytes, t.offset % 32) == ((2, 4), "F32", 32, 0)
        assert (u.shape, u.type, u.nbytes, u.offset) == ((32,), "Q8_0", 34, t.offset + 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "4 bytes expected at byte 0, 0 are left"),
        (b"GGUF", "4 bytes expected at byte 4, 0 are left"),
        (container(magic=b"GGML"), "does not begin with GGUF"),
        (container(version=1), "version must be 2 or 3, little-endian; got 1"),
        (container(version=4), "version must be 2 or 3"),
        (container(version=3 << 24), "version must be 2 or 3"),  # big-endian
        (container(counts=(0, HUGE)), "is there twice"),
        (container(counts=(HUGE, 0)), "must have 1 to 4 dimensions"),
        (container([struct.pack("<Q", HUGE)]), "bytes expected"),
        (container([struct.pack("<Q", 2**40) + b"x"]), "bytes expected"),
        (container([field(b"\xff\xfe", 4, u32(1))]), "is not UTF-8"),
        (container([field("a", 8, string(b"\xff"))]), "is not UTF-8"),
        (container([field("a", 13, u32(1))]), "metadata of unknown type 13"),
        (container([field("a", 9, array(4, 2**61))]), "bytes expected"),
        (container([field("a", 9, array(4, HUGE))]), "bytes expected"),
        (container([field("a", 9, array(8, HUGE))], data=4000), "bytes expected"),
        (container([field("a", 9, array(9, 1, array(4, 0)))]), "array of unsupported type 9"),
        (container([field("a", 9, array(77, 1))]), "array of unsupported type 77"),
        (container([field("a", 4, u32(1))] * 2), "'a' is there twice"),
        (container(infos=[info("t", [4])] * 2), "'t' is there twice"),
        (container(infos=[info("t", [])]), "must have 1 to 4 dimensions, got 0"),
        (container(infos=[info("t", [1] * 5)]), "must have 1 to 4 dimensions, got 5"),
        (container(infos=[info("t", [0])]), "cannot have shape (0,)"),
        (container(infos=[info("t", [4, 0])]), "cannot have shape (0, 4)"),
        (container(infos=[info("t", [2**63, 2**63])]), "tensor t ends at byte"),
        (container(infos=[info("t", [2**32, 2**32])]), "tensor t ends at byte"),
        (container(infos=[info("t", [65])]), "tensor t ends at byte"),
        (container(infos=[info("t", [4], offset=2**63)]), "tensor t ends at byte"),
        (container(infos=[info("t", [4], offset=256)]), "tensor t ends at byte"),
        (container(infos=[info("t", [4], offset=8)]), "tensor t is not aligned to 32 bytes"),
        (container(infos=[info("t", [33], 8)]), "tensor t of type Q8_0 cannot have shape (33,)"),
        (container(infos=[info("t", [4], 99)]), "tensor t is of unknown type 99"),
        (container(infos=[info("t", [4], 4)]), "tensor t is of unknown type 4"),
        (container(infos=[info("t", [16]), info("u", [16], 0, 32)]), "tensors t and u overlap"),
        (container(infos=[info("t", [16]), info("u", [16])]), "overlap"),
        (container([field("general.alignment", 4, u32(0))]), "general.alignment must be a power"),
        (container([field("general.alignment", 4, u32(48))]), "general.alignment must be a power"),
        (container([field("general.alignment", 6, u32(0))]), "general.alignment must be a power"),
    ],
)
def test_damaged_containers(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert message in error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_a_directory_named_like_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        read_gguf(tmp_path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    """A small model with every part that a file can have."""
    tokens = [f"t{i}" for i in range(97)]
    metadata = {
        "general.name": "tiny",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 97,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 94,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ x }}",
    }
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    write_gguf(path, config, random_weights(config), matrices="Q4_1", metadata=metadata)
    open_checkpoint(path)
    return path.read_bytes()


def test_every_truncation(tmp_path, whole_file):
    path = tmp_path / "m.gguf"
    for size in [*range(0, 6000, 29), *range(6000, len(whole_file), 997), len(whole_file) - 32]:
        path.write_bytes(whole_file[:size])
        error_of(path)


def test_random_damage(tmp_path, whole_file):
    """Whatever happens to a file, it is refused in one line or its weights are usable."""
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    refused, rounds = 0, 500
    tracemalloc.start()
    try:
        for _ in range(rounds):
            path.write_bytes(damaged(whole_file, rng))
            try:
                tensors = read_all(path)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                assert all(np.isfinite(values_of(tensor)).all() for tensor in tensors.values())
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
    assert rounds * 0.3 < refused < rounds
