"""What every model source is brought to: a configuration, named tensors, a tokenizer."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import MobileLLMConfig, expected_shapes
from ..errors import CheckpointError
from ..quant import QuantizedTensor
from ..tokenizer import Tokenizer

# Older exporters also wrote the rotary frequencies, which follow from the configuration.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that still lies in its file.

    Args:
        shape: rows first, as in Hugging Face.
        dtype: what the file holds: "float32" (also any type that is widened to it), "float16",
            "bfloat16", "int8_rows" (a scale per row), "int8" (groups of 32, as GGUF Q8_0), "int4"
            (groups of 32, as GGUF Q4_1), or "int4_sym" (as GGUF Q4_0).
        read: returns float32 of `shape`, or a `QuantizedTensor` for the integers.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray | QuantizedTensor]


@dataclass
class Checkpoint:
    """A model source, opened and checked; tensors are read one at a time, when asked for.

    Args:
        name: the model's name, for display.
        path: the file or directory it was opened from.
        config: its configuration.
        tensors: every tensor of the source, under Hugging Face's Llama names.
        tokenizer: its tokenizer, or None if it brings none.
        chat_template: its Jinja template for chats, or None.
        format: the one of `quant.FORMATS` that the whole was quantized to, or None.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape, or the tokenizer
            has ids the model does not know.
    """

    name: str
    path: Path
    config: MobileLLMConfig
    tensors: dict[str, StoredTensor] = field(repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    chat_template: str | None = field(default=None, repr=False)
    format: str | None = None

    def __post_init__(self) -> None:
        self.tensors = {k: t for k, t in self.tensors.items() if not k.endswith(IGNORED_SUFFIX)}
        self._check_tensors()
        if self.config.tie_word_embeddings and HEAD in self.tensors:
            self._drop_tied_head()
        if self.tokenizer and self.tokenizer.vocab_size > self.config.vocab_size:
            raise self._error(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"more than vocab_size ({self.config.vocab_size})"
            )

    @property
    def names(self) -> list[str]:
        """The tensors' names; a tied model has no `lm_head.weight`."""
        return list(self.tensors)

    @property
    def dtype(self) -> str:
        """The `StoredTensor.dtype` that holds most of the weights."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += math.prod(tensor.shape)
        return sizes.most_common(1)[0][0]

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Read one tensor from the file.

        Returns:
            float32, C-contiguous; or a `QuantizedTensor` where the file's own grid is one.

        Raises:
            CheckpointError: no tensor has this name, it cannot be read, or it is not finite.
        """
        if name not in self.tensors:
            raise self._error(f"there is no tensor {name!r}")
        value = self.tensors[name].read()
        if isinstance(value, QuantizedTensor):
            floats = [value.scales] if value.mins is None else [value.scales, value.mins]
        else:
            floats = [value]
        if not all(np.isfinite(part).all() for part in floats):
            raise self._error(f"{name} must be finite, got NaN or infinity")
        return value

    def _check_tensors(self) -> None:
        # Before expected_shapes, which would list a damaged count of a billion layers.
        if self.config.num_hidden_layers > len(self.tensors):
            raise self._error(
                f"num_hidden_layers is {self.config.num_hidden_layers}, "
                f"but there are only {len(self.tensors)} tensors"
            )
        expected = expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in self.tensors:
                raise self._error(f"tensor {name} is missing")
            if self.tensors[name].shape != shape:
                raise self._error(
                    f"tensor {name} must have shape {shape}, got {self.tensors[name].shape}"
                )
        for name in self.tensors:
            if name not in expected and not (name == HEAD and self.config.tie_word_embeddings):
                raise self._error(f"tensor {name} is not part of this model")

    def _drop_tied_head(self) -> None:
        """A tied model may come with a copy of its embedding as head, but not with another one."""
        # One after the other: both in memory at once would be the peak of the whole load.
        if self._digest(HEAD) != self._digest(EMBEDDING):
            raise self._error(f"{HEAD} differs from {EMBEDDING}, yet the configuration ties them")
        del self.tensors[HEAD]

    def _digest(self, name: str) -> tuple:
        value = self.tensors[name].read()
        parts = (value,)
        if isinstance(value, QuantizedTensor):
            parts = (value.codes, value.scales, value.mins)
        digests = [None if part is None else hashlib.sha256(part).digest() for part in parts]
        return self.tensors[name].shape, *digests

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")
