"""The KV cache of one sequence in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import MobileLLMConfig
from ..errors import MobileLLMError

PAGE = 128  # tokens that a session's file keeps together, as on the CPU
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class CudaCache:
    """Keys and values, (positions of the schedule, 2, KV heads, capacity, head_dim).

    The capacity doubles when it is full, up to the model's context. Kernels find the memory through
    `address` and `capacity`, so a recorded graph serves every cache.
    """

    layout = "rows"  # of pages, see `session_file.identity`

    def __init__(self, config: MobileLLMConfig, format: str, device: torch.device) -> None:
        self.format = format
        self.length = 0
        self._config = config
        self._shape = (len(config.schedule), 2, config.num_key_value_heads)
        self._data = torch.empty(
            (*self._shape, 0, config.head_dim), dtype=FORMATS[format], device=device
        )

    @property
    def data(self) -> torch.Tensor:
        """All keys and values: (positions, 2, KV heads, capacity, head_dim)."""
        return self._data

    @property
    def kind(self) -> tuple:
        """What kernels take for granted: equal for the caches of one executor."""
        return (*self._shape, self._config.head_dim, self.format, self._data.device)

    @property
    def capacity(self) -> int:
        """How many tokens fit without moving."""
        return self._data.shape[3]

    @property
    def address(self) -> int:
        """Where `data` lies on the device; growing moves it."""
        return self._data.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes of `data`."""
        return self._data.nbytes

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page of `PAGE` tokens, as `pages` gives them."""
        heads = self._shape[0] * self._shape[1] * self._shape[2]
        return heads * PAGE * self._config.head_dim * self._data.element_size()

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        if tokens <= self.capacity:
            return
        limit = -(-self._config.context_length // PAGE) * PAGE
        if tokens > limit:
            raise MobileLLMError(f"[forward] the context holds {limit} tokens, got {tokens}")
        capacity = min(max(2 * self.capacity, -(-tokens // PAGE) * PAGE, 2 * PAGE), limit)
        grown = self._data.new_empty((*self._shape, capacity, self._config.head_dim))
        grown[:, :, :, : self.length] = self._data[:, :, :, : self.length]
        self._data = grown

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens."""
        if not 0 <= length <= self.length:
            raise MobileLLMError(f"[truncate] length must be in 0..{self.length}, got {length}")
        self.length = length

    def copy(self) -> CudaCache:
        """Return another cache with the same tokens."""
        other = CudaCache(self._config, self.format, self._data.device)
        other.reserve(self.length)
        other._data[:, :, :, : self.length] = self._data[:, :, :, : self.length]
        other.length = self.length
        return other

    def pages(self) -> list[bytes]:
        """Return the tokens' keys and values in pages of 128 tokens, the last one padded."""
        pages = []
        for start in range(0, self.length, PAGE):
            page = self._data.new_zeros((*self._shape, PAGE, self._config.head_dim))
            count = min(PAGE, self.length - start)
            page[:, :, :, :count] = self._data[:, :, :, start : start + count]
            pages.append(page.cpu().view(torch.uint8).numpy().tobytes())
        return pages

    @torch.inference_mode()  # in which an executor made this memory: nobody else may write to it
    def restore(self, length: int, pages: Sequence[bytes]) -> None:
        """Take what `pages` gave, in place of what is here."""
        if len(pages) != -(-length // PAGE) or any(len(p) != self.page_nbytes for p in pages):
            raise MobileLLMError(
                f"[restore] pages of {length} tokens must be {-(-length // PAGE)} of "
                f"{self.page_nbytes} bytes, got {[len(page) for page in pages]}"
            )
        self.length = 0
        self.reserve(length)
        for index, page in enumerate(pages):
            values = torch.frombuffer(bytearray(page), dtype=self._data.dtype)
            values = values.view(*self._shape, PAGE, self._config.head_dim)
            start = index * PAGE
            count = min(PAGE, length - start)
            self._data[:, :, :, start : start + count] = values[:, :, :, :count]
        self.length = length
