import dataclasses
import json
import pickle

import pytest
import transformers
from helpers import LLAMA3_SCALING, MODEL_CONFIGS, tiny_config

from mobilellm_fast.config import PRESETS, MobileLLMConfig, expected_shapes
from mobilellm_fast.errors import CheckpointError, MobileLLMError

PARAMETERS = {
    "MobileLLM-125M": 124_635_456,
    "MobileLLM-350M": 345_355_200,
    "MobileLLM-600M": 603_188_352,
    "MobileLLM-1B": 1_005_461_760,
    "MobileLLM-1.5B": 1_562_388_800,
    "MobileLLM-LS-125M": 124_635_456,
    "MobileLLM-LS-350M": 345_355_200,
}

# As published for MobileLLM-125M on the hub.
MOBILELLM_125M = {
    "architectures": ["MobileLLMForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_mobilellm.MobileLLMConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_sharing": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "mobilellm",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}


def raw(**changes):
    fields = tiny_config().to_hf() | changes
    return {name: value for name, value in fields.items() if value is not ...}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_parameters(name):
    config = MobileLLMConfig.preset(name)
    assert config.num_parameters == PARAMETERS[name]
    assert config.tie_word_embeddings == (name != "MobileLLM-1.5B")
    assert config.head_dim == 64
    assert bool(config.layer_sharing) == ("LS" in name)


def test_presets_are_all_counted():
    assert set(PRESETS) == set(PARAMETERS)
    with pytest.raises(MobileLLMError, match=r"preset must be one of .*, got 'MobileLLM-2B'"):
        MobileLLMConfig.preset("MobileLLM-2B")


@pytest.mark.parametrize(
    ("sharing", "repeats", "schedule"),
    [
        (False, 2, (0, 1, 2)),
        (True, 2, (0, 0, 1, 1, 2, 2)),
        ("immediate", 3, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
        ("repeat_all", 2, (0, 1, 2, 0, 1, 2)),
        ("reverse", 2, (0, 1, 2, 2, 1, 0)),
        ("reverse", 3, (0, 1, 2, 2, 1, 0, 0, 1, 2)),
        ("repeat_all", 1, (0, 1, 2)),
    ],
)
def test_schedule(sharing, repeats, schedule):
    config = tiny_config(num_hidden_layers=3, layer_sharing=sharing, layer_repeats=repeats)
    assert config.schedule == schedule
    assert config.num_parameters == tiny_config(num_hidden_layers=3).num_parameters


def test_true_means_immediate():
    assert tiny_config(layer_sharing=True) == tiny_config(layer_sharing="immediate")


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_expected_shapes_are_those_of_transformers(name):
    config = MODEL_CONFIGS[name]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert expected_shapes(config) == shapes
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [*MODEL_CONFIGS.values(), *PRESETS.values()])
def test_round_trip_through_config_json(config):
    assert MobileLLMConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    # transformers 5 renames rope_scaling, drops nulls and adds fields of its own
    theirs = transformers.LlamaConfig(**config.to_hf())
    assert MobileLLMConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config
    assert MobileLLMConfig.from_hf(theirs.to_dict()) == config


def test_config_is_hashable_and_picklable():
    config = tiny_config(rope_scaling=LLAMA3_SCALING)
    assert hash(config) == hash(tiny_config(rope_scaling=dict(LLAMA3_SCALING)))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1


def test_caller_keeps_its_dict():
    scaling = {"type": "linear", "factor": 2}
    config = tiny_config(rope_scaling=scaling)
    scaling["factor"] = 3
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_published_mobilellm_config():
    config = MobileLLMConfig.from_hf(MOBILELLM_125M)
    assert config == MobileLLMConfig.preset("MobileLLM-125M")
    shared = MobileLLMConfig.from_hf(MOBILELLM_125M | {"layer_sharing": True, "use_cache": False})
    assert shared == MobileLLMConfig.preset("MobileLLM-LS-125M")
    without = {k: v for k, v in MOBILELLM_125M.items() if k != "layer_sharing"}
    assert MobileLLMConfig.from_hf(without).layer_sharing is False


def test_absent_fields_take_the_defaults_of_transformers():
    absent = ("num_key_value_heads", "rms_norm_eps", "head_dim", "rope_theta", "rope_scaling")
    absent += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "max_position_embeddings")
    fields = raw(**dict.fromkeys(absent, ...))
    ours, theirs = MobileLLMConfig.from_hf(fields), transformers.LlamaConfig(**fields)
    for name in set(absent) - {"rope_theta", "rope_scaling"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == 10000.0
    assert ours.rope_scaling is None


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, ("linear", 2.0)),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
            3e4,
            None,
        ),
        (
            {
                "rope_theta": 7e4,
                "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 3e4},
            },
            3e4,
            ("dynamic", 3.0),
        ),
    ],
)
def test_both_styles_of_rope(fields, theta, scaling):
    config = MobileLLMConfig.from_hf(raw(**fields))
    assert config.rope_theta == theta
    expected = scaling and {"rope_type": scaling[0], "factor": scaling[1]}
    assert config.rope_scaling == expected


def test_context_length():
    assert tiny_config(max_position_embeddings=100).context_length == 100
    for kind, length in (("linear", 250), ("dynamic", 250)):
        scaling = {"rope_type": kind, "factor": 2.5}
        config = tiny_config(max_position_embeddings=100, rope_scaling=scaling)
        assert config.context_length == length
    assert tiny_config(rope_scaling=LLAMA3_SCALING).context_length == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 48.0}, "hidden_size must be an integer, got 48.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, got True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer, got '2'"),
        (
            {"num_key_value_heads": 4},
            r"num_attention_heads must be a multiple of num_key_value_heads \(4\), got 6",
        ),
        ({"hidden_size": 50}, "hidden_size must be a multiple of num_attention_heads"),
        ({"head_dim": 7}, r"head_dim must be even \(RoPE rotates pairs\), got 7"),
        ({"head_dim": -2}, "head_dim must be at least 2, got -2"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be finite and at least 0, got -1e-05"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rope_theta": 0}, "rope_theta must be finite and above 0, got 0"),
        ({"rope_theta": "big"}, "rope_theta must be a number, got 'big'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a dict or None, got 'linear'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            r"rope_scaling type must be one of \('linear', 'dynamic', 'llama3'\), got 'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type 'linear' needs 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "'factor' must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "'factor' must be a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}},
            "rope_scaling 'mscale' is not supported with type 'linear'",
        ),
        (
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1}},
            "'high_freq_factor' must exceed 'low_freq_factor'",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be a bool, got 1"),
        ({"layer_sharing": "twice"}, "layer_sharing must be a bool or one of .*, got 'twice'"),
        ({"layer_sharing": 1}, "layer_sharing must be a bool or one of .*, got 1"),
        ({"layer_repeats": 0}, "layer_repeats must be at least 1, got 0"),
        ({"layer_repeats": 65}, "layer_repeats must be at most 64, got 65"),
        (
            {"max_position_embeddings": 10**400},
            "max_position_embeddings must be at most 2147483647",
        ),
        ({"rope_theta": 1e308}, "rope_theta must fit a float32, got 1e"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e308}},
            "'factor' must (be at most 1024|fit a float32), got 1e",
        ),
        ({"eos_token_id": [2, 97]}, r"eos_token_id must be below vocab_size \(97\), got 97"),
        ({"bos_token_id": -1}, "bos_token_id must be at least 0, got -1"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(changes, message):
    with pytest.raises(MobileLLMError, match=message) as error:
        tiny_config(**changes)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError):
        MobileLLMConfig.from_hf(raw(**{"head_dim": ...} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported",
        ),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ({"w_bits": 4}, "w_bits = 4 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types with 'sliding_attention'"),
        ({"model_type": "gpt2"}, "model_type must be one of .*, got 'gpt2'"),
        ({"model_type": ...}, "model_type must be one of .*, got None"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures must be among .*'GPT2LMHeadModel'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"share_embedding": "yes"}, "share_embedding must be true or false, got 'yes'"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_scaling type .* got \['linear'\]"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling type .* got 'longrope'"),
    ],
)
def test_unsupported_config_json_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        MobileLLMConfig.from_hf(raw(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, [], "llama", 3])
def test_config_json_must_be_an_object(value):
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        MobileLLMConfig.from_hf(value)


def test_harmless_fields_are_accepted():
    config = MobileLLMConfig.from_hf(
        raw(
            rope_interleaved=False,
            is_llama_config=True,
            pad_token_id=2,
            attention_dropout=0.0,
            torch_dtype="bfloat16",
            layer_types=["full_attention"] * 2,
            eos_token_id=[2, 3],
            bos_token_id=None,
        )
    )
    assert config.eos_token_id == (2, 3)
    assert config.bos_token_id is None
