"""Writes a model as a directory that transformers reads, if its weights are floats, and `load`.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  chat_template.jinja

Quantized matrices lie in `model.safetensors` as the kernels read them, one flat uint8 tensor each,
at multiples of 64 bytes, so a mapped file is the memory of a model. transformers knows nothing of
them; `load` reads them back bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint.huggingface import CHAT_TEMPLATE_FILE
from .checkpoint.packed_tensors import METHOD, packed_name
from .checkpoint.safetensors_file import write_safetensors
from .errors import CheckpointError
from .files import brief, checked_path
from .quant import QUANTIZED_KINDS, PackedWeight
from .tokenizer import OWN_FILE, Tokenizer

if TYPE_CHECKING:
    from .config import MobileLLMConfig
    from .weights import Weights

# what a model may have, but need not
REPLACED = {
    CHAT_TEMPLATE_FILE,
    OWN_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def save_pretrained(
    directory: str | Path,
    config: MobileLLMConfig,
    weights: Weights,
    format: str,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a model; a directory that is there keeps its old files until all new ones are complete.

    Args:
        directory: is created; files of an earlier model in it are replaced.
        weights: as `MobileLLM.weights` returns them.
        format: one of `quant.FORMATS`, for quantized weights.

    Raises:
        MobileLLMError: `directory` is no path.
        CheckpointError: it cannot be written.
    """
    directory = checked_path("[save_pretrained] directory", directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            _write(staging, config, weights, format, tokenizer, chat_template)
            directory.mkdir(exist_ok=True)
            written = sorted(file.name for file in staging.iterdir())
            for name in written:
                os.replace(staging / name, directory / name)
            for name in REPLACED - set(written):  # or an earlier model's would be read
                (directory / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({brief(error)})") from None


def _write(
    folder: Path,
    config: MobileLLMConfig,
    weights: Weights,
    format: str,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
) -> None:
    kinds = {w.kind for w in weights.values() if isinstance(w, PackedWeight)}
    fields: dict[str, Any] = config.to_hf()
    fields["dtype"] = "bfloat16" if kinds == {"bf16"} else "float32"
    if kinds & set(QUANTIZED_KINDS):
        fields["quantization_config"] = {"quant_method": METHOD, "format": format}
    write_safetensors(folder / "model.safetensors", dict(_named_arrays(weights)))
    write_json(folder / "config.json", fields)
    if tokenizer is not None:
        tokenizer.save(folder)
        ends = config.eos_token_id
        ends = ends if isinstance(ends, tuple) else (ends,)
        if set(tokenizer.eos_token_ids) - set(ends):
            more = {"eos_token_id": list(tokenizer.eos_token_ids)}
            write_json(folder / "generation_config.json", more)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _named_arrays(weights: Weights):
    for name, weight in weights.items():
        if isinstance(weight, np.ndarray):
            yield name, weight
        elif weight.kind in QUANTIZED_KINDS:
            yield packed_name(name, weight.kind), weight.data
        else:
            yield name, weight.data


def write_json(path: Path, value: Any) -> None:
    """Write a JSON object for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
