"""The `config.json` of Hugging Face: reading its fields, and refusing those we do not compute."""

from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

MODEL_TYPES = ("llama", "mobilellm")
ARCHITECTURES = ("LlamaForCausalLM", "MobileLLMForCausalLM")

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIONAL = (
    "num_key_value_heads",
    "rms_norm_eps",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "layer_sharing",
    "layer_repeats",
)

# Fields that change the computation, and the values that leave it as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "w_bits": (16, 32),
    "sliding_window": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "num_local_experts": (0, 1),
}


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `config.json` into the arguments of `MobileLLMConfig`.

    Raises:
        CheckpointError: a required field is missing, or one is not supported; names the field.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"[config] must be a JSON object, got {type(raw).__name__}")
    _refuse_unsupported(raw)
    for name in REQUIRED:
        if raw.get(name) is None:
            raise CheckpointError(f"[config] {name} is missing")
    # transformers' defaults where they are not ours; an explicit null counts as absent
    fields = {"num_key_value_heads": raw["num_attention_heads"], "rms_norm_eps": 1e-6}
    fields |= {name: raw[name] for name in REQUIRED + OPTIONAL if raw.get(name) is not None}
    # for these, null means "none" and only absence means the default
    fields |= {name: raw[name] for name in ("bos_token_id", "eos_token_id") if name in raw}
    return fields | {"tie_word_embeddings": _is_tied(raw)} | _rope(raw)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"[config] model_type must be one of {MODEL_TYPES}, got {raw.get('model_type')!r}"
        )
    for name in _list(raw, "architectures"):
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"[config] architectures must be among {ARCHITECTURES}, got {name!r}"
            )
    for name, neutral in NEUTRAL.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            raise CheckpointError(f"[config] {name} = {value!r} is not supported")
    for kind in _list(raw, "layer_types"):
        if kind != "full_attention":
            raise CheckpointError(f"[config] layer_types with {kind!r} is not supported")


def _list(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name) or []
    if not isinstance(value, list):
        raise CheckpointError(f"[config] {name} must be a list, got {value!r}")
    return value


def _is_tied(raw: Mapping[str, Any]) -> bool:
    """MobileLLM's own checkpoints say `share_embedding` and leave `tie_word_embeddings` false."""
    flags = {name: raw.get(name) for name in ("tie_word_embeddings", "share_embedding")}
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(f"[config] {name} must be true or false, got {flag!r}")
    return any(flags.values())


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read `rope_scaling` or transformers 5's `rope_parameters`; what is inside wins, as there."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"[config] rope_scaling must be an object, got {scaling!r}")
    scaling = {name: value for name, value in scaling.items() if value is not None}
    theta = scaling.pop("rope_theta", None)
    theta = raw.get("rope_theta") if theta is None else theta
    partial = scaling.pop("partial_rotary_factor", 1)
    if partial != 1:
        raise CheckpointError(f"[config] partial_rotary_factor = {partial!r} is not supported")
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        trained = raw.get("original_max_position_embeddings")
        trained = trained or scaling.get("original_max_position_embeddings")
        trained = trained or raw.get("max_position_embeddings") or 2048
        scaling["original_max_position_embeddings"] = trained
    return {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": scaling or None,
    }
