"""`mobilellm_fast.load`: the engine and the torch model, over the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .engine import Engine
from .errors import MobileLLMError

if TYPE_CHECKING:
    from .model import MobileLLM


def load(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    format: str = "auto",
    threads: int | None = None,
    revision: str | None = None,
    kv_format: str | None = None,
) -> MobileLLM:
    """Load a model as a `torch.nn.Module` that generates at full speed.

    Args:
        source: a Hugging Face directory, a hub id, a .gguf or .mlf file, "tiny" for the small model
            in this package, or None for SmolLM2-135M-Instruct (98 MB, fetched once).
        device: `"auto"` or `"cpu"`.
        format: `"fp32"`, `"bf16"`, `"int8"`, `"w8a8"`, `"int4"`, `"int4_all"`, or `"auto"`: the
            file's own grid if it is a quantized GGUF, else `"int8"`.
        threads: how many to use; None means as many as decode fastest, see `Engine.load`.
        revision: branch, tag or commit of a hub id.
        kv_format: `"fp16"`, `"fp32"` or `"int8"`, how generation keeps keys and values; None takes
            `"fp32"` for float formats, else `"fp16"`.

    Returns:
        The model, in evaluation mode. Its parameters (`fp32`, `bf16`) or packed buffers are the
        memory that generation reads: there is one copy.

    Raises:
        MobileLLMError: an argument is out of range.
        CheckpointError: the source cannot be found, read or trusted.
    """
    if device not in ("auto", "cpu"):
        raise MobileLLMError(f"[load] device must be 'auto' or 'cpu', got {device!r}")
    engine = Engine.load(
        source, format=format, threads=threads, revision=revision, kv_format=kv_format
    )

    from .model import MobileLLM

    return MobileLLM.from_engine(engine).eval()
