"""From a text file to batches of token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError, MobileLLMError
from ..files import brief, whole_file
from ..tokenizer import Tokenizer

END = "<|endoftext|>"
PIECE = 20_000  # characters
HELD_OUT = 20  # every 20th piece is for validation: each part of the text is in both


@dataclass(frozen=True)
class Corpus:
    """Token ids to train on and to validate with.

    Args:
        train, validation: 1-D int64.
    """

    train: torch.Tensor
    validation: torch.Tensor

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> torch.Tensor:
        """Draw (batch_size, seq_len) ids; the same for the same seed and step."""
        starts = np.random.default_rng([seed, step]).integers(
            0, len(self.train) - seq_len + 1, batch_size
        )
        return torch.stack([self.train[start : start + seq_len] for start in starts.tolist()])

    def windows(self, seq_len: int) -> torch.Tensor:
        """The validation ids as (windows, seq_len), one behind the other."""
        count = len(self.validation) // seq_len
        return self.validation[: count * seq_len].view(count, seq_len)

    @property
    def digest(self) -> str:
        """Tells corpora apart."""
        digest = hashlib.sha256(self.train.numpy())
        digest.update(self.validation.numpy())
        return digest.hexdigest()[:16]


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text ({brief(error)})") from None


def split(text: str) -> tuple[str, str]:
    """Cut a text at ends of lines, and return what to train on and what to validate with."""
    pieces, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            pieces.append("".join(piece))
            piece, size = [], 0
    pieces.append("".join(piece))
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT] or pieces[-1:]
    kept = [p for i, p in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]
    return "".join(kept if len(pieces) > 1 else pieces), "".join(held_out)


def make_corpus(text: str, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    """Tokenize a text and split it.

    Raises:
        MobileLLMError: it is too short for one sequence of each part.
    """
    parts = []
    for name, part in zip(("train", "validation"), split(text), strict=True):
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) < seq_len:
            raise MobileLLMError(
                f"[train] the text must have at least seq_len ({seq_len}) tokens to {name} with, "
                f"got {len(ids)}"
            )
        parts.append(torch.tensor(ids))
    return Corpus(*parts)


def train_tokenizer(text: str, vocab_size: int) -> bytes:
    """Make a byte-level BPE of a text; returns a `tokenizer.json`.

    Args:
        vocab_size: at least 257: the bytes, and id 0, which begins and ends a text.
    """
    if vocab_size < 257:
        raise MobileLLMError(f"[train] vocab_size must be at least 257, got {vocab_size}")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(split(text)[0].splitlines(keepends=True), trainer)
    return library.to_str().encode()


def write_tokenizer(data: bytes, folder: Path) -> Tokenizer:
    """Write a `tokenizer.json` of `train_tokenizer` with its settings, and open it.

    Raises:
        CheckpointError: it cannot be written.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    try:
        with whole_file(folder / "tokenizer.json") as file:
            file.write(data)
        with whole_file(folder / "tokenizer_config.json") as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({brief(error)})") from None
    return Tokenizer.from_directory(folder)
