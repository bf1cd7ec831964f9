"""GGUF files as transformers reads them, with its own code: an independent oracle."""

from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from mobilellm_fast.checkpoint import open_checkpoint
from mobilellm_fast.config import expected_shapes


def read_by_transformers(path: Path) -> dict:
    """Return what it reads: `config`, and `tensors` by its own names and permutation, among all."""
    config = open_checkpoint(path).config
    model = SimpleNamespace(  # all it asks of a model are the names of its parameters
        config=transformers.LlamaConfig(**config.to_hf()),
        state_dict=lambda: expected_shapes(config),
        named_children=list,
    )
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
