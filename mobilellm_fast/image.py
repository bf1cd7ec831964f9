"""The packed image: a model as one file that is mapped into memory as it is.

    magic "MLFIMAGE" | header length, checksum | header (JSON) | tokenizer | weights

The header has the configuration, the place of every tensor and the checksums of the other parts.
The tokenizer is a compiled table wherever it can be (`tokenizer/compiled.py`).
The weights lie as they do in memory (`weights.py`), so opening an image is one `mmap`, a few checks
and a pass of checksums; processes that open the same image share its memory. Nothing in an image is
trusted: whatever does not agree with the configuration or the checksums is refused.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _C, quant
from .config import MobileLLMConfig
from .errors import CheckpointError, MobileLLMError
from .files import brief, whole_file
from .tokenizer import Tokenizer
from .weights import Slot, Weights, plan_slots

SUFFIX = ".mlf"
MAGIC = b"MLFIMAGE"
VERSION = 3  # of the header and of the packed layout in quant.py; others are refused
PREFIX = struct.Struct("<8sIIQ")  # magic, version, header bytes, header checksum
LINE = 64  # the tokenizer starts at a multiple of it
PAGE = 1 << 16  # weights start at a multiple of it: the largest page size in use


@dataclass
class Image:
    """A model in memory, complete but for the executor.

    Args:
        config: the architecture.
        weights: tensors by name, parts of `buffer`.
        buffer: flat uint8, laid out by `weights.plan_slots`.
        format: one of `quant.FORMATS`.
        tokenizer: or None.
        chat_template: or None.
        name: for display.
    """

    config: MobileLLMConfig
    weights: Weights
    buffer: np.ndarray
    format: str
    tokenizer: Tokenizer | None
    chat_template: str | None
    name: str

    def save(self, path: Path, source: str = "") -> None:
        """Write the image; the file appears complete or not at all.

        Args:
            path: to write to; an existing file is replaced.
            source: what the image was made from, for `open_image` to compare.

        Raises:
            CheckpointError: it cannot be written.
        """
        tokenizer = b""
        if self.tokenizer:
            tokenizer = self.tokenizer.compile() or self.tokenizer.serialize()
        kinds = {name: w.kind for name, w in self.weights.items() if not isinstance(w, np.ndarray)}
        header = json.dumps(
            {
                "source": source,
                "name": self.name,
                "format": self.format,
                "config": self.config.to_hf(),
                "kinds": kinds,
                "chat_template": self.chat_template,
                "tokenizer_nbytes": len(tokenizer),
                "tokenizer_checksum": _C.checksum(tokenizer),
                "weights_nbytes": self.buffer.nbytes,
                "weights_checksum": _C.checksum(self.buffer),
            }
        ).encode()
        prefix = PREFIX.pack(MAGIC, VERSION, len(header), _C.checksum(header))
        start = _weights_start(len(header), len(tokenizer))
        try:
            with whole_file(path) as file:
                file.write(prefix + header)
                file.seek(_tokenizer_start(len(header)))
                file.write(tokenizer)
                file.seek(start)
                file.write(self.buffer)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({brief(error)})") from None


def check_output(path: Path) -> None:
    """Refuse a path that an image should not be written to: another kind of file, or nowhere.

    Raises:
        CheckpointError: says which.
    """
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: a packed image must be named *{SUFFIX}")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no directory {path.parent}")
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path}: exists and is not a packed image")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({brief(error)})") from None


def open_image(path: Path, source: str | None = None, threads: int = 1) -> Image:
    """Map an image and check it. What is cached of it in small pages is read again, for huge ones.

    Args:
        path: a file that `Image.save` wrote.
        source: what it must have been made from; None accepts any.
        threads: to compute the checksum with.

    Raises:
        CheckpointError: it is not an image of this version, from this source, or not whole.
    """
    try:
        data = _C.map_file(os.fsencode(path), MAGIC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from None

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: {why}")

    if len(data) < PREFIX.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise refuse("is not a packed image")
    _, version, header_nbytes, header_checksum = PREFIX.unpack(bytes(data[: PREFIX.size]))
    if version != VERSION:
        raise refuse(f"must have image version {VERSION}, got {version}; pack the model again")
    header = bytes(data[PREFIX.size : PREFIX.size + header_nbytes])
    if len(header) != header_nbytes or _C.checksum(header) != header_checksum:
        raise refuse("the header is damaged")
    try:
        fields = json.loads(header)
        if source is not None and fields["source"] != source:
            raise MobileLLMError("was made from another source")
        config = MobileLLMConfig.from_hf(fields["config"])
        slots = _slots(config, fields)
        name, chat_template = fields["name"], fields["chat_template"]
        if not isinstance(name, str) or not isinstance(chat_template, (str, type(None))):
            raise MobileLLMError("name and chat_template must be text")
        tokenizer_nbytes = fields["tokenizer_nbytes"]
        if not isinstance(tokenizer_nbytes, int) or tokenizer_nbytes < 0:
            raise MobileLLMError(f"tokenizer_nbytes must be >= 0, got {brief(tokenizer_nbytes)}")
        start = _weights_start(header_nbytes, tokenizer_nbytes)
        buffer = data[start:]
        if len(buffer) != fields["weights_nbytes"]:
            whole = start + fields["weights_nbytes"]
            raise MobileLLMError(f"must have {whole} bytes, got {len(data)}")
        tokenizer_start = _tokenizer_start(header_nbytes)
        tokenizer = data[tokenizer_start : tokenizer_start + tokenizer_nbytes]
        if _C.checksum(tokenizer) != fields["tokenizer_checksum"]:
            raise MobileLLMError("the tokenizer is damaged")
        if _C.checksum(buffer, threads) != fields["weights_checksum"]:
            raise MobileLLMError("the weights are damaged")
        return Image(
            config,
            {slot.name: slot.view(buffer) for slot in slots},
            buffer,
            fields["format"],
            Tokenizer.deserialize(tokenizer) if tokenizer_nbytes else None,
            chat_template,
            name,
        )
    except MobileLLMError as error:
        raise refuse(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise refuse(f"the header is damaged ({brief(error)})") from None


def _slots(config: MobileLLMConfig, fields: dict) -> list[Slot]:
    format, kinds = fields["format"], fields["kinds"]
    if format not in quant.FORMATS:
        raise MobileLLMError(f"unknown format {brief(format)}")
    for name, kind in kinds.items():
        if kind not in quant.kinds_of(format):
            raise MobileLLMError(f"{name} cannot be {brief(kind)} in format {format}")
    if config.num_hidden_layers > len(kinds):  # before a damaged count makes a list of a billion
        raise MobileLLMError("num_hidden_layers exceeds the tensors")
    slots = plan_slots(config, kinds)
    if slots[-1].offset + slots[-1].nbytes != fields["weights_nbytes"]:
        raise MobileLLMError("tensors and their sizes disagree")
    return slots


def _tokenizer_start(header_nbytes: int) -> int:
    return -(-(PREFIX.size + header_nbytes) // LINE) * LINE


def _weights_start(header_nbytes: int, tokenizer_nbytes: int) -> int:
    end = _tokenizer_start(header_nbytes) + tokenizer_nbytes
    return -(-end // PAGE) * PAGE
