"""Turns a float model into a quantized one, in place, and back."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import ops, packed, quant
from ..config import expected_shapes
from ..errors import MobileLLMError
from ..quant import PackedWeight, pack
from .rounding import round_int4
from .smoothing import smooth_
from .statistics import collect, input_of

if TYPE_CHECKING:
    from ..model import MobileLLM

EMBEDDING = "model.embed_tokens.weight"
WINDOW = 512  # tokens of a calibration text that are run at once
LEAST_TOKENS = 64


@torch.no_grad()
def quantize_(
    lm: MobileLLM,
    format: str = "int8",
    *,
    calibration: str | Sequence[int] | Tensor | None = None,
    untie_head: bool = False,
    symmetric: bool = False,
) -> MobileLLM:
    """Quantize a float model in place.

    Without a text, weights are rounded to the nearest code, as `load` does. With a text, 4-bit
    formats search the scales and make up for the error of each column with those that follow, and
    `w8a8` moves outliers of activations into weights, which changes norms and weights but not the
    function; `int8` stays as it is.

    Args:
        lm: float parameters on the CPU.
        format: "int8", "w8a8", "int4" or "int4_all", see `quant.kind_of`.
        calibration: a text, or token ids (n,) or (batch, seq); a few thousand tokens of the kind
            that the model will read. Not the text that it is judged by.
        untie_head: give a tied model a head of its own, so that `w8a8` can smooth its input, too:
            as many weights more as the embedding has.
        symmetric: round 4-bit weights on the grid of GGUF's Q4_0, which has no minimums: 4.5 bits
            per weight instead of 5, and coarser.

    Returns:
        `lm`.

    Raises:
        MobileLLMError: an unknown format, a model that is quantized already, or a calibration text
            that is too short or without a tokenizer.
    """
    if format not in quant.INTEGER_FORMATS:
        raise MobileLLMError(
            f"[quantize_] format must be one of {quant.INTEGER_FORMATS}, got {format!r}"
        )
    weights = lm.weights()
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight) and weight.kind in quant.QUANTIZED_KINDS:
            raise MobileLLMError(
                f"[quantize_] lm must have float weights, got {weight.kind} in {name}; "
                "dequantize_ it first"
            )
        values = weight if not isinstance(weight, PackedWeight) else weight.dequantize()
        if not np.isfinite(values).all():
            raise MobileLLMError(f"[quantize_] {name} must be finite, got NaN or infinity")
    ids = None if calibration is None else _calibration_ids(lm, calibration)
    inputs = None
    if untie_head:  # nothing is wrong with the arguments: from here on the model changes
        lm.untie()
    if ids is not None and format != "int8":
        inputs = collect(lm.float(), ids)
    if format == "w8a8" and inputs is not None:
        smooth_(lm, inputs)
    rounded: dict[str, PackedWeight | np.ndarray] = {}
    for name, shape in expected_shapes(lm.config).items():
        weight = lm.get_parameter(name).detach().float()
        if len(shape) == 1:
            rounded[name] = weight.numpy().copy()
            continue
        kind = quant.kind_of(format, name, "float32")
        # an untied embedding is looked up: no column's error can be made up for by others
        is_table = name == EMBEDDING and not lm.config.tie_word_embeddings
        if kind == "int4_g32" and symmetric:
            kind = "int4_sym_g32"
        if kind in quant.INT4_KINDS and inputs is not None and not is_table:
            rounded[name] = pack(round_int4(weight, inputs[input_of(name)].moments, symmetric))
        else:
            rounded[name] = pack(weight.numpy(), kind)
    return replace_weights_(lm, rounded, format)


@torch.no_grad()
def dequantize_(lm: MobileLLM) -> MobileLLM:
    """Turn quantized weights into float32 parameters of the same values, in place.

    What remains is the rounding; that of activations is gone.
    """
    values = {}
    for name, weight in lm.weights().items():
        if isinstance(weight, PackedWeight):
            value = weight.dequantize()
            weight = pack(value.copy() if weight.kind == "fp32" else value)
        values[name] = weight
    return replace_weights_(lm, values, "fp32")


def replace_weights_(
    lm: MobileLLM, weights: dict[str, PackedWeight | np.ndarray], format: str
) -> MobileLLM:
    """Put other weights into a model, see `MobileLLM.from_weights`."""
    packed.install(lm, expected_shapes(lm.config), weights, format)
    lm.set_format(format)
    return lm


def _calibration_ids(lm: MobileLLM, calibration: str | Sequence[int] | Tensor) -> Tensor:
    if isinstance(calibration, str):
        if lm.tokenizer is None:
            raise MobileLLMError("[quantize_] calibration must be token ids: there is no tokenizer")
        calibration = lm.tokenizer.encode(calibration)
    try:
        ids = torch.as_tensor(calibration)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different lengths
        ids = torch.empty(())
    if ids.ndim not in (1, 2) or (ids.numel() and ids.dtype not in ops.INTEGERS):
        raise MobileLLMError(
            "[quantize_] calibration must be a text, or token ids (seq) or (rows, seq), "
            f"got {reprlib.repr(calibration)}"
        )
    if ids.ndim == 1:
        window = min(WINDOW, lm.config.context_length, max(1, len(ids)))
        ids = ids[: len(ids) // window * window].view(-1, window)
    if ids.numel() < LEAST_TOKENS:
        raise MobileLLMError(
            f"[quantize_] calibration must have at least {LEAST_TOKENS} tokens, got {ids.numel()}"
        )
    return ids
