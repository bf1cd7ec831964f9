"""The model and the text of the gates: a real one where it was brought along, else a random one."""

from pathlib import Path

import numpy as np
import torch
from gpu_gates import Text
from gpu_models import shape
from gpu_plain import random_ids, random_weights

TOKENS = 1024
PACKED = Path(__file__).resolve().parents[1] / ".gpu" / "model"  # where `gpu_pack` puts it


def gate_text(device: torch.device, dry: bool, packed: Path = PACKED) -> Text:
    """Return the packed model and its text, or 125M with random weights and random tokens."""
    if packed.is_dir() and not dry:
        from gpu_pack import unpack

        config, weights, ids = unpack(packed)
        weights = {
            name: torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.bfloat16)
            for name, values in weights.items()
        }
        return Text(config, weights, ids[:TOKENS], f"SmolLM2-135M, {config.vocab_size} tokens")
    config = shape("125M", dry)
    weights = random_weights(config, device, torch.bfloat16)
    ids = random_ids(config, 120 if dry else TOKENS)
    return Text(config, weights, ids, "125M, random weights")
