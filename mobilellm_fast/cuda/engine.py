"""A model ready to generate on a GPU."""

from __future__ import annotations

from pathlib import Path

from ..config import MobileLLMConfig
from ..engine import Engine
from ..errors import MobileLLMError
from ..packing import check_format, load_image
from ..tokenizer import Tokenizer
from ..weights import Weights
from .cache import CudaCache
from .executor import CudaExecutor, check_cuda, check_options
from .weights import CudaWeights

FORMATS = ("auto", "fp32", "bf16", "int8", "int4", "int4_all")


class OnlyOnCPU(MobileLLMError):
    """The source turned out to have a format that only the CPU has kernels for."""


class CudaEngine(Engine):
    """Generates text on a GPU; `mobilellm_fast.load(device="cuda")` returns one inside a model.

    Args:
        config, weights, format, tokenizer, chat_template, name: see `Engine`; weights are copied to
            the device.
        device: of torch, such as "cuda" or "cuda:1".
        kv_format: "fp16", "bf16" or "fp32", how keys and values are kept; None takes fp32 for fp32
            weights, else fp16.
        tier: how single tokens are decoded, see `CudaExecutor`.
    """

    on_gpu = True

    def __init__(
        self,
        config: MobileLLMConfig,
        weights: Weights,
        format: str,
        *,
        device: str = "cuda",
        tokenizer: Tokenizer | None = None,
        chat_template: str | None = None,
        name: str = "model",
        kv_format: str | None = None,
        tier: str = "auto",
    ) -> None:
        self.config = config
        self.weights = weights
        self.format = format
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.name = name
        on_device = CudaWeights.from_packed(config, weights, device)
        self.executor = CudaExecutor(config, on_device, tier, kv_format)

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        device: str = "cuda",
        format: str = "auto",
        revision: str | None = None,
        kv_format: str | None = None,
        tier: str = "auto",
    ) -> CudaEngine:
        """Load a model onto a GPU.

        Args:
            source, revision: see `packing.load_image`.
            device, kv_format, tier: see `CudaEngine`.
            format: `fp32`, `bf16`, `int8`, `int4` or `int4_all`: how weights are stored; they are
                multiplied as floats. `auto` keeps a GGUF file's own grid where there are kernels
                for it, and takes `bf16` otherwise.

        Raises:
            MobileLLMError: an argument is out of range, or there is no GPU or no Triton.
            OnlyOnCPU: the source is an image in `w8a8`.
            CheckpointError: the source cannot be found, read or trusted.
        """
        check_format(format)
        if format not in FORMATS:
            raise MobileLLMError(
                f"[load] format must be one of {', '.join(FORMATS)} on cuda, got {format!r}"
            )
        check_options(tier, kv_format)
        check_cuda(device)
        image = load_image(source, format, revision, float_format="bf16")
        if image.format not in FORMATS:
            raise OnlyOnCPU(
                f"[load] format of {source} must be one of {', '.join(FORMATS[1:])} on cuda, "
                f"got {image.format!r}"
            )
        return cls(
            image.config,
            image.weights,
            image.format,
            device=device,
            tokenizer=image.tokenizer,
            chat_template=image.chat_template,
            name=image.name,
            kv_format=kv_format,
            tier=tier,
        )

    def decode(
        self, cache: CudaCache, token_id: int, count: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[list[int], list[float]]:
        """Read a token, then what is chosen after it, see `CudaExecutor.decode`."""
        return self.executor.decode(cache, token_id, count, temperature, seed)
