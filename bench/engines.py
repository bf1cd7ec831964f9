"""Engines to measure: published shapes with random weights, and a real model."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np

from mobilellm_fast import _C, quant
from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.engine import Engine
from mobilellm_fast.image import Image
from mobilellm_fast.weights import plan_slots

DEFAULT = "default"  # the real model; `--model` names another
CONTEXT = 4096  # more than the published 2048, so that decoding can follow a prompt of 2048
PATTERN_ROWS = 64  # random rows that a matrix repeats: making 1.5 G different ones takes minutes


def shape(preset: str) -> MobileLLMConfig:
    """Return the configuration of a preset such as "125M", "LS-125M" or "125M-unshared".

    The last is as deep as the sharing model runs, but with every block of its own (the paper's
    60 blocks). No token ends a text, so that all sequences are as long as they are asked to be.
    """
    config = MobileLLMConfig.preset(f"MobileLLM-{preset.removesuffix('-unshared')}")
    if preset.endswith("-unshared"):
        config = replace(config, num_hidden_layers=2 * config.num_hidden_layers)
    return replace(config, max_position_embeddings=CONTEXT, eos_token_id=None)


def smoke_shape(config: MobileLLMConfig) -> MobileLLMConfig:
    """Return the same with a tenth of the blocks and a small vocabulary."""
    blocks = max(1, config.num_hidden_layers // 10)
    return replace(config, num_hidden_layers=blocks, vocab_size=1000)


def random_image(config: MobileLLMConfig, format: str, name: str) -> Image:
    """Make a model of random weights of a sensible size, complete but for a tokenizer."""
    kinds = {
        key: quant.kind_of(format, key, "float32")
        for key, size in expected_shapes(config).items()
        if len(size) == 2
    }
    slots = plan_slots(config, kinds)
    buffer = _C.allocate(slots[-1].offset + slots[-1].nbytes)
    weights = {}
    for slot in slots:
        weights[slot.name] = slot.view(buffer)
        if slot.kind == "vector":
            weights[slot.name][:] = 1
        else:
            repeat(_pattern(slot.kind, slot.shape[1]), buffer[slot.offset :][: slot.nbytes])
    return Image(config, weights, buffer, format, None, None, name)


def repeat(pattern: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with a pattern, again and again; both are flat."""
    whole = len(out) // len(pattern) * len(pattern)
    out[:whole].reshape(-1, len(pattern))[:] = pattern
    out[whole:] = pattern[: len(out) - whole]


@functools.cache
def _pattern(kind: str, cols: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, cols**-0.5, (PATTERN_ROWS, cols))
    return quant.pack(values.astype(np.float32), kind).data.reshape(-1).view(np.uint8)


class Engines:
    """Engines of one model at a time, by format; another model replaces them.

    Args:
        source: of the real model, see `Engine.load`.
        smoke: take `smoke_shape` of presets.
    """

    def __init__(self, source: str | Path | None, smoke: bool) -> None:
        self._source, self._smoke = source, smoke
        self._preset, self._engines = "", {}

    def get(self, preset: str, format: str) -> Engine:
        """Return an engine; `preset` is `DEFAULT` or as for `shape`."""
        if preset != self._preset:
            self._preset, self._engines = preset, {}
        if format not in self._engines:
            self._engines[format] = self.make(preset, format)
        return self._engines[format]

    def make(self, preset: str, format: str) -> Engine:
        """Return an engine that is not kept."""
        if preset == DEFAULT:
            return Engine.load(self._source, format=format)
        config = smoke_shape(shape(preset)) if self._smoke else shape(preset)
        image = random_image(config, format, preset)
        return Engine(config, image.weights, format, name=preset)


def with_threads(engine: Engine, threads: int) -> Engine:
    """Return an engine over the same weights with another number of threads."""
    return Engine(engine.config, engine.weights, engine.format, name=engine.name, threads=threads)
