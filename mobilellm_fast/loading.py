"""`mobilellm_fast.load`: the engine and the torch model, over the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .engine import Engine
from .errors import MobileLLMError
from .executor import check_threads

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
        device: `"cpu"`, `"cuda"` or `"cuda:N"`; `"auto"` takes a GPU if there is one, unless
            something is asked for that only the CPU has, or the file is an image in `w8a8`.
        format: `"fp32"`, `"bf16"`, `"int8"`, `"w8a8"` (CPU only), `"int4"`, `"int4_all"`, or
            `"auto"`: the file's own grid if it is a quantized GGUF, else `"int8"` on a CPU and
            `"bf16"` on a GPU.
        threads: of the CPU; None means as many as decode fastest, see `Engine.load`.
        revision: branch, tag or commit of a hub id.
        kv_format: `"fp16"`, `"fp32"` or, on a CPU, `"int16"` or `"int8"`, on a GPU `"bf16"`: how
            generation keeps keys and values; None takes `"fp32"` for float formats (on a GPU for
            `"fp32"`), else `"int16"` on a CPU and `"fp16"` on a GPU.

    Returns:
        The model, in evaluation mode. Its parameters (`fp32`, `bf16`) or packed buffers are the
        memory that generation reads: there is one copy.

    Raises:
        MobileLLMError: an argument is out of range.
        CheckpointError: the source cannot be found, read or trusted.
    """
    chosen, device = device, str(device)  # one of torch.device is as good
    if device not in ("auto", "cpu") and device.partition(":")[0] != "cuda":
        raise MobileLLMError(
            f"[load] device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {chosen!r}"
        )
    from .model import MobileLLM

    if device == "auto":
        for_cpu = threads is not None or format == "w8a8" or kv_format in ("int8", "int16")
        on_gpu = not for_cpu and _has_gpu()
    else:
        on_gpu = device != "cpu"
    if on_gpu:
        from .cuda.engine import CudaEngine, OnlyOnCPU

        check_threads(threads)
        try:
            engine = CudaEngine.load(
                source,
                device="cuda" if device == "auto" else device,
                format=format,
                revision=revision,
                kv_format=kv_format,
            )
            return MobileLLM.from_engine(engine).eval()
        except OnlyOnCPU:
            if device != "auto":
                raise
    engine = Engine.load(
        source, format=format, threads=threads, revision=revision, kv_format=kv_format
    )
    return MobileLLM.from_engine(engine).eval()


def _has_gpu() -> bool:
    """Tell whether torch and Triton can use a GPU, of compute capability 8 or later."""
    import torch

    from .triton_version import has_triton

    if not torch.cuda.is_available() or not has_triton():
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability()[0] >= 8
