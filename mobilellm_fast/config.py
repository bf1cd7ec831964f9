"""Model configuration: validation, presets, the layer schedule and Hugging Face's config.json."""

import math
import operator
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from .config_json import read_fields
from .errors import CheckpointError, MobileLLMError

SHARING_STRATEGIES = ("immediate", "repeat_all", "reverse")

# rope_type -> the numbers it needs beside it
ROPE_SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


MAX_INTEGER = 2**31 - 1
MAX_FLOAT32 = 2.0**128
MAX_ROPE_FACTOR = 1024
MAX_LAYER_REPEATS = 64  # published models use 2; a damaged file must not make an endless schedule


@dataclass(frozen=True)
class MobileLLMConfig:
    """Describe a MobileLLM-class (Llama architecture) model; field names are Hugging Face's.

    Args:
        vocab_size: number of token ids; ids are `0 .. vocab_size - 1`.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_hidden_layers: number of blocks held in memory, however often sharing runs each.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides `num_attention_heads`.
        head_dim: width of one head, even; None means `hidden_size // num_attention_heads`.
        max_position_embeddings: length in tokens the model was trained for.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None or `{"rope_type": "linear" | "dynamic" | "llama3", "factor": ..., ...}`
            with the keys transformers documents for that type.
        tie_word_embeddings: whether the output head is the embedding matrix.
        bos_token_id: first token of a text, or None.
        eos_token_id: token or tokens that end a text, or None.
        initializer_range: standard deviation of freshly initialised weights.
        layer_sharing: False, "immediate" (or True: MobileLLM-LS), "repeat_all" or "reverse".
        layer_repeats: how often sharing runs each block; unused when `layer_sharing` is False.

    Raises:
        MobileLLMError: a field is out of range or contradicts another.
    """

    vocab_size: int = 32000
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = cast(int, None)  # hidden_size // num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # a dict cannot be hashed; equal configs still hash equal without it
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    initializer_range: float = 0.02
    layer_sharing: bool | str = False
    layer_repeats: int = 2

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "layer_repeats",
        ):
            self._set(name, _integer(name, getattr(self, name), minimum=1))
        if self.layer_repeats > MAX_LAYER_REPEATS:
            raise _error(
                f"layer_repeats must be at most {MAX_LAYER_REPEATS}, got {self.layer_repeats}"
            )
        for name, positive in (
            ("rms_norm_eps", False),
            ("rope_theta", True),
            ("initializer_range", False),
        ):
            self._set(name, _number(name, getattr(self, name), positive=positive))
        if self.num_attention_heads % self.num_key_value_heads:
            raise _error(
                f"num_attention_heads must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise _error(
                    f"hidden_size must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) unless head_dim is given, "
                    f"got {self.hidden_size}"
                )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        self._set("head_dim", _integer("head_dim", self.head_dim, minimum=2))
        if self.head_dim % 2:
            raise _error(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise _error(f"tie_word_embeddings must be a bool, got {self.tie_word_embeddings!r}")
        self._set("rope_scaling", _rope_scaling(self.rope_scaling, self.head_dim))
        self._set("layer_sharing", _layer_sharing(self.layer_sharing))
        self._set("bos_token_id", self._token_id("bos_token_id", self.bos_token_id))
        if isinstance(self.eos_token_id, (list, tuple)):
            ids = tuple(self._token_id("eos_token_id", i) for i in self.eos_token_id)
            self._set("eos_token_id", ids)
        else:
            self._set("eos_token_id", self._token_id("eos_token_id", self.eos_token_id))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way into a frozen dataclass

    def _token_id(self, name: str, value: Any) -> int | None:
        if value is None:
            return None
        value = _integer(name, value, minimum=0)
        if value >= self.vocab_size:
            raise _error(f"{name} must be below vocab_size ({self.vocab_size}), got {value}")
        return value

    @property
    def schedule(self) -> tuple[int, ...]:
        """Block index at each execution position; a position, not a block, owns a KV slot.

        For two blocks and two repeats: none `(0, 1)`, immediate `(0, 0, 1, 1)`,
        repeat_all `(0, 1, 0, 1)`, reverse `(0, 1, 1, 0)`.
        """
        blocks = tuple(range(self.num_hidden_layers))
        if self.layer_sharing == "immediate":
            return tuple(block for block in blocks for _ in range(self.layer_repeats))
        if self.layer_sharing == "repeat_all":
            return blocks * self.layer_repeats
        if self.layer_sharing == "reverse":
            return sum((blocks[:: -1 if i % 2 else 1] for i in range(self.layer_repeats)), ())
        return blocks

    @property
    def num_parameters(self) -> int:
        """Number of weights held; a tied embedding counts once, a shared block counts once."""
        return sum(math.prod(shape) for shape in expected_shapes(self).values())

    @property
    def context_length(self) -> int:
        """Most tokens one sequence may have.

        `max_position_embeddings`, times the factor where scaling stretches it at run time
        ("linear", "dynamic"); a "llama3" checkpoint already states its stretched length.
        """
        if self.rope_scaling and self.rope_scaling["rope_type"] in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        return self.max_position_embeddings

    @classmethod
    def preset(cls, name: str) -> "MobileLLMConfig":
        """Return a published configuration such as "MobileLLM-125M" or "MobileLLM-LS-350M".

        Raises:
            MobileLLMError: no preset has this name.
        """
        try:
            return PRESETS[name]
        except (KeyError, TypeError):
            raise _error(f"preset must be one of {', '.join(PRESETS)}, got {name!r}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "MobileLLMConfig":
        """Read a `config.json` of model type "llama" or "mobilellm".

        Both styles of rotary settings are read: `rope_theta` + `rope_scaling`, and the
        `rope_parameters` of transformers 5. Absent fields take transformers' defaults.

        Raises:
            CheckpointError: a needed field is missing or wrong, or a field changes the
                computation in a way that is not implemented; the message names the field.
        """
        fields = read_fields(raw)
        try:
            return cls(**fields)
        except MobileLLMError as error:
            raise CheckpointError(str(error)) from None

    def to_hf(self) -> dict[str, Any]:
        """Return the fields of a `config.json`, as `transformers.LlamaConfig(**fields)` takes them.

        transformers keeps but does not run `layer_sharing`, so a sharing model is labelled
        "mobilellm", which no plain Llama loader will take for its own.
        """
        shared = bool(self.layer_sharing)
        fields = {
            "architectures": ["MobileLLMForCausalLM" if shared else "LlamaForCausalLM"],
            "model_type": "mobilellm" if shared else "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
        fields |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        if shared:
            fields["share_embedding"] = self.tie_word_embeddings
        return fields


def expected_shapes(config: MobileLLMConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the model, under Hugging Face's Llama names.

    A tied model has no `lm_head.weight`. Matrices are (output features, input features).
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _presets() -> dict[str, MobileLLMConfig]:
    # size: (hidden, intermediate, blocks, heads, KV heads)
    sizes = {
        "125M": (576, 1536, 30, 9, 3),
        "350M": (960, 2560, 32, 15, 5),
        "600M": (1152, 3072, 40, 18, 6),
        "1B": (1280, 3584, 54, 20, 5),
        "1.5B": (1600, 4352, 54, 25, 5),
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    presets = {}
    for size, values in sizes.items():
        fields = dict(zip(names, values, strict=True))
        tied = size != "1.5B"
        presets[f"MobileLLM-{size}"] = MobileLLMConfig(tie_word_embeddings=tied, **fields)
        if size in ("125M", "350M"):
            presets[f"MobileLLM-LS-{size}"] = MobileLLMConfig(layer_sharing="immediate", **fields)
    return presets


def _error(message: str) -> MobileLLMError:
    return MobileLLMError(f"[config] {message}")


def _integer(name: str, value: Any, minimum: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise _error(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise _error(f"{name} must be at least {minimum}, got {number}")
    if number > MAX_INTEGER:
        raise _error(f"{name} must be at most {MAX_INTEGER}, got {reprlib.repr(number)}")
    return number


def _number(name: str, value: Any, positive: bool = True) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _error(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise _error(
            f"{name} must be finite and {'above' if positive else 'at least'} 0, got {value!r}"
        )
    if number >= MAX_FLOAT32:
        raise _error(f"{name} must fit a float32, got {value!r}")
    return number


def _layer_sharing(value: Any) -> bool | str:
    if value is True:
        return "immediate"
    if value is False or (isinstance(value, str) and value in SHARING_STRATEGIES):
        return value
    raise _error(f"layer_sharing must be a bool or one of {SHARING_STRATEGIES}, got {value!r}")


def _rope_scaling(value: Any, head_dim: int) -> dict[str, Any] | None:
    """Check scaling parameters and bring them to one form; "default" scaling becomes None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error(f"rope_scaling must be a dict or None, got {value!r}")
    given = dict(value)
    old_name = given.pop("type", "default")  # up to transformers 4.42 the key was "type"
    kind = given.pop("rope_type", old_name)
    if kind == "default" and not given:
        return None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise _error(f"rope_scaling type must be one of {tuple(ROPE_SCALINGS)}, got {kind!r}")
    if kind != "llama3":
        given.pop("original_max_position_embeddings", None)  # transformers does not use it either
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_SCALINGS[kind]:
        if name not in given:
            raise _error(f"rope_scaling of type {kind!r} needs {name!r}")
        if name == "original_max_position_embeddings":
            scaling[name] = _integer(f"rope_scaling {name!r}", given.pop(name), minimum=1)
        else:
            scaling[name] = _number(f"rope_scaling {name!r}", given.pop(name))
    if given:
        raise _error(f"rope_scaling {sorted(given)[0]!r} is not supported with type {kind!r}")
    if scaling["factor"] < 1:
        raise _error(f"rope_scaling 'factor' must be at least 1, got {scaling['factor']}")
    if scaling["factor"] > MAX_ROPE_FACTOR:
        limit, got = MAX_ROPE_FACTOR, scaling["factor"]
        raise _error(f"rope_scaling 'factor' must be at most {limit}, got {got}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise _error(
            f"rope_scaling 'high_freq_factor' must exceed 'low_freq_factor' "
            f"({scaling['low_freq_factor']}), got {scaling['high_freq_factor']}"
        )
    if kind == "dynamic" and head_dim < 4:
        raise _error(f"rope_scaling of type 'dynamic' needs head_dim of at least 4, got {head_dim}")
    return scaling


PRESETS = _presets()
