"""Tier `ring`: any number of decode steps in one launch of `kernels/ring/decode.cu`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from .. import kernels
from ..config import MobileLLMConfig
from ..errors import MobileLLMError
from ..kernels.cuda_source import Kernel, kernel
from ..quant import GROUP
from .cache import FORMATS, CudaCache
from .geometry import softmax_scale
from .steps import NotTaken, Steps
from .weights import CudaWeights, Matrix

SOURCE = Path(kernels.__file__).parent / "ring" / "decode.cu"
# enum Kind and CacheType of the source
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int8_g32": 3, "int4_g32": 4}
CACHES = {"fp16": 0, "bf16": 1, "fp32": 2}
WARPS = 16  # of a program: with more, threads would have too few registers
# Those of them that multiply, for narrow models: so many that no fewer turns would do.
NARROW_WARPS, NARROW = 12, 960
FINISHERS = 0  # of them, warps that do nothing but publish results; see docs/gpu.md
RING_SLOTS = 16  # of the ring, at most: what shared memory holds is less
ROOM_FOR_PARTS = 8  # of a head's attention, in the vectors
LOAD_NBYTES = 16  # of a row that are copied or read at a time
EPOCHS = 5  # of a layer
LAST_EPOCH = 1 << 31
CANDIDATE_NBYTES = 20  # of a program


class _Codes(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p)]


class Arguments(ctypes.Structure):
    """`Arguments` of the source."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("steps", "token", "position", "capacity", "length")),
        ("first_epoch", ctypes.c_uint),
        *((name, ctypes.c_float) for name in ("eps", "scale", "temperature")),
        ("seed", ctypes.c_ulonglong),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("schedule", "cache", "tokens", "logprobs", "counter", "vectors", "candidates"),
                *("logits", "cos", "sin", "attention_norms", "ffn_norms", "final_norm"),
            )
        ),
        *((name, _Codes) for name in ("qkv", "output", "gate_up", "down", "head", "embedding")),
        ("clock", ctypes.c_void_p),
    ]


class RingSteps(Steps):
    """One cooperative launch for any number of steps.

    Args:
        programs: of the grid, at most; None takes one per multiprocessor.
        finishers: warps that do nothing but publish results, see `kernel_constants`.
        constants: macros of the source that differ from `kernel_constants`, for measurements.

    Raises:
        NotTaken: the kernel does not take this model, see `obstacle`.
        MobileLLMError: it does not take this GPU, or there is no NVRTC.
    """

    def __init__(
        self,
        weights: CudaWeights,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv_format: str,
        programs: int | None = None,
        finishers: int = FINISHERS,
        constants: dict[str, int] | None = None,
    ) -> None:
        super().__init__(weights, rotary, kv_format)
        needs = obstacle(weights, kv_format)
        if needs is not None:
            raise NotTaken(f"[load] tier 'ring' needs {needs}")
        config, device = weights.config, weights.device
        if programs is None:
            programs = torch.cuda.get_device_properties(device).multi_processor_count
        # one without a share of some vector could be left behind: nobody would wait for it
        self.programs = min(programs, config.hidden_size // 2, config.intermediate_size)
        kinds = (weights.qkv.kind, weights.head.kind, weights.embedding.kind)
        self.constants = kernel_constants(config, *kinds, kv_format, self.programs, finishers)
        self.constants |= constants or {}
        self._kernel = self._load() if device.type == "cuda" else None
        self._vectors = torch.zeros(self.constants["VECTORS"], dtype=torch.int64, device=device)
        self._candidates = torch.zeros(
            self.programs * CANDIDATE_NBYTES, dtype=torch.uint8, device=device
        )
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._epoch = 1  # of the next launch; those before it are in the vectors
        # nanoseconds at the ends of stages, with the constant CLOCKED
        self.clock = torch.zeros(self.constants.get("CLOCKED", 0), dtype=torch.int64, device=device)
        tensors = {
            "schedule": self.schedule,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "counter": self._counter,
            "vectors": self._vectors,
            "candidates": self._candidates,
            "logits": self.logits,
            "cos": self.cos,
            "sin": self.sin,
            "attention_norms": weights.attention_norms,
            "ffn_norms": weights.ffn_norms,
            "final_norm": weights.final_norm,
            "clock": self.clock,
        }
        matrices = ("qkv", "output", "gate_up", "down", "head", "embedding")
        self._arguments = Arguments(
            length=len(self.schedule),
            eps=config.rms_norm_eps,
            scale=softmax_scale(weights),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **{name: _codes(getattr(weights, name)) for name in matrices},
        )

    def _run(
        self, cache: CudaCache, token_id: int, count: int, temperature: float, seed: int
    ) -> None:
        self._counter.zero_()
        used = count * (EPOCHS * len(self.schedule) + 1)
        if self._epoch + used >= LAST_EPOCH:  # values of long ago must not be taken for new ones
            self._vectors.zero_()
            self._epoch = 1
        arguments = self._arguments
        arguments.steps, arguments.token, arguments.position = count, token_id, cache.length
        arguments.capacity, arguments.cache = cache.capacity, cache.address
        # values have a few bits of their epochs: after a launch that fails they begin anew
        arguments.first_epoch, self._epoch = self._epoch, LAST_EPOCH
        arguments.temperature, arguments.seed = temperature, seed
        self._launch(arguments)
        self._epoch = arguments.first_epoch + used

    def _load(self) -> Kernel:
        properties = torch.cuda.get_device_properties(self.weights.device)
        limit = {"SHARED_LIMIT": properties.shared_memory_per_block_optin}
        with torch.cuda.device(self.weights.device):
            constants = tuple(sorted((limit | self.constants).items()))
            return kernel(SOURCE, constants, torch.cuda.current_device())

    def _launch(self, arguments: Arguments) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel.launch(arguments, self.programs, self.constants["THREADS"], stream)


def obstacle(weights: CudaWeights, kv_format: str) -> str | None:
    """Say what the kernel needs that a model does not have, or None."""
    config = weights.config
    body = (weights.qkv, weights.output, weights.gate_up, weights.down)
    if len({matrix.kind for matrix in body}) > 1:
        return f"blocks of one kind of weights, got {', '.join(m.kind for m in body)}"
    if "fp32" in (weights.qkv.kind, weights.head.kind):
        return "blocks and a head in bf16, int8 or int4, got fp32"
    for matrix in (*body, weights.head):
        nbytes = matrix.codes.shape[-1] * matrix.codes.element_size()
        if nbytes % LOAD_NBYTES:
            return f"rows of a multiple of {LOAD_NBYTES} bytes, got {nbytes}"
        if matrix.codes.data_ptr() % LOAD_NBYTES:
            return f"matrices at multiples of {LOAD_NBYTES} bytes"
        if matrix.rows * nbytes >= 1 << 31:
            return f"matrices of less than 2 GiB, got {matrix.rows * nbytes} bytes"
        if matrix.kind == "int8_g32" and matrix.cols % (2 * GROUP):
            return f"rows of a multiple of {2 * GROUP} inputs, got {matrix.cols}"
    sizes = config.vocab_size, config.hidden_size, config.intermediate_size
    if any(size % 4 for size in sizes):
        return (
            "a vocab_size, hidden_size and intermediate_size of multiples of 4, "
            "got {}, {} and {}".format(*sizes)
        )
    lanes = config.head_dim * FORMATS[kv_format].itemsize // LOAD_NBYTES
    if lanes not in (1, 2, 4, 8, 16, 32) or config.head_dim & (config.head_dim - 1):
        return f"a head_dim of a power of two, 16 to 512 bytes, got {config.head_dim}"
    return None


def kernel_constants(
    config: MobileLLMConfig,
    body: str,
    head: str,
    embedding: str,
    kv_format: str,
    programs: int,
    finishers: int = FINISHERS,
) -> dict[str, int]:
    """Return the macros of the source for a model.

    Args:
        body, head, embedding: kinds of weights, those of the blocks first.
        programs: of the grid.
        finishers: warps that do nothing but publish results; 0 leaves it to those that multiply.

    Raises:
        MobileLLMError: so many warps that finish, or fewer than none, cannot be.
    """
    if not 0 <= finishers <= WARPS - 2:  # one brings the weights, one multiplies
        raise MobileLLMError(f"[load] finishers must be from 0 to {WARPS - 2}, got {finishers}")
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    partial = config.num_attention_heads * ROOM_FOR_PARTS * (config.head_dim + 1)
    values = 2 * (config.hidden_size + queries + keys) + config.intermediate_size
    handed = queries + keys + 2  # words, with ATTEND_BY_TILES
    vectors = -(-values // 2) + partial + handed
    most = WARPS - 1 - finishers  # one brings the weights
    warps = min(NARROW_WARPS, most) if config.hidden_size < NARROW else most
    return {
        "PROGRAMS": programs,
        "WARPS": warps,
        "FINISHERS": finishers,
        "THREADS": 32 * (warps + finishers + 1),
        "LEAVE_FIRST": 0,
        "ATTEND_BY_TILES": 0,
        "RING_SLOTS": RING_SLOTS,
        "VECTORS": vectors,
        "HIDDEN": config.hidden_size,
        "INNER": config.intermediate_size,
        "VOCAB": config.vocab_size,
        "HEADS": config.num_attention_heads,
        "KV_HEADS": config.num_key_value_heads,
        "HEAD_DIM": config.head_dim,
        "CACHE": CACHES[kv_format],
        "BODY_KIND": KINDS[body],
        "HEAD_KIND": KINDS[head],
        "EMBEDDING_KIND": KINDS[embedding],
    }


def _codes(matrix: Matrix) -> _Codes:
    scales = None if matrix.scales is None else matrix.scales.data_ptr()
    return _Codes(matrix.codes.data_ptr(), scales)
