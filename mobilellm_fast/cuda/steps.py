"""Decode steps of one sequence: the token loop stays on the device.

Four tiers, which compute the same and are each other's oracle:

============== ====================================================================================
``graph``      one kernel per stage, recorded as a CUDA graph, one replay per token
``pdl``        the same, each kernel starting while the one before ends
``persistent`` one kernel for any number of tokens
``ring``       another one, in CUDA C++, see `ring.py`
============== ====================================================================================

A `Steps` has fixed buffers, for one call at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MobileLLMError
from ..kernels.decode import grid_sync, persistent, step
from .cache import FORMATS, CudaCache
from .geometry import Geometry, power_of_two, scales_of, softmax_scale, vector_size
from .recording import recorded
from .weights import CudaWeights, Matrix

MAX_STEPS = 64  # tokens of one call
STAGE_WARPS = 4  # rows of a program of the tiers with one kernel per stage
ATTENTION_WARPS = 8
PERSISTENT_WARPS = 8  # more would have too few registers each
CANDIDATE_FIELDS = 5


class NotTaken(MobileLLMError):
    """A tier has no kernels for a model, whatever the machine."""


class Steps:
    """What the tiers share: buffers and the loop over calls."""

    def __init__(self, weights: CudaWeights, rotary: tuple[Tensor, Tensor], kv_format: str) -> None:
        self.weights = weights
        self.geometry = Geometry(weights)
        self.cos, self.sin = rotary
        self.kv = _triton_dtype(kv_format)
        config, device = weights.config, weights.device
        self.schedule = torch.tensor(config.schedule, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(MAX_STEPS, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(MAX_STEPS, dtype=torch.float32, device=device)
        self.logits = torch.zeros(config.vocab_size, dtype=torch.float32, device=device)

    def run(
        self, cache: CudaCache, token_id: int, count: int, temperature: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Read `token_id` at the end of the cache, then what was chosen, `count` tokens in all.

        Returns:
            tokens: int32 (count,), the choices; the last one is not in the cache yet.
            logprobs: float32 (count,). `self.logits` are those of the last step.
        """
        cache.reserve(cache.length + count)
        # above 32 bits, so that Triton takes every seed for the same type
        self._run(cache, token_id, count, temperature, seed + (1 << 32))
        cache.length += count
        return self.tokens[:count].cpu(), self.logprobs[:count].cpu()

    def _run(
        self, cache: CudaCache, token_id: int, count: int, temperature: float, seed: int
    ) -> None:
        raise NotImplementedError


class StagedSteps(Steps):
    """Tiers `graph` and `pdl`: launches recorded once, replayed for every token.

    Without CUDA (Triton's interpreter) the launches simply run.
    """

    def __init__(self, *args: Any, pdl: bool) -> None:
        super().__init__(*args)
        self._wait = "pdl" if pdl else "none"
        self._ahead = pdl  # both take compute capability 9
        self._launch = {"num_warps": STAGE_WARPS} | ({"launch_pdl": True} if pdl else {})
        config, device = self.weights.config, self.weights.device
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self._output_programs = _programs(hidden)
        self._head_programs = min(_programs(config.vocab_size), 1024)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._x, self._middle = floats(hidden), floats(hidden)
        self._qkv, self._attended = floats(queries + 2 * keys), floats(queries)
        self._inner = floats(inner)
        self._partial = floats(self.geometry.partial_size)
        self._candidates = floats(self._head_programs, CANDIDATE_FIELDS)
        self._state = torch.zeros(4, dtype=torch.int32, device=device)
        self._token, self._position, self._capacity, self._step = self._state.split(1)
        self._temperature = floats(1)
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._address = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: Any = None

    def _run(
        self, cache: CudaCache, token_id: int, count: int, temperature: float, seed: int
    ) -> None:
        self._state.copy_(torch.tensor([token_id, cache.length, cache.capacity, 0]))
        self._address.fill_(cache.address)
        self._temperature.fill_(temperature)
        self._seed.fill_(seed)
        embedding = self.weights.embedding
        step.embed_kernel[(1,)](
            self._token,
            embedding.codes,
            scales_of(embedding),
            self._x,
            COLS=embedding.cols,
            KIND=embedding.kind,
            BLOCK=power_of_two(embedding.cols),
        )
        if self.weights.device.type != "cuda":
            for _ in range(count):
                self._launch_step()
            return
        if self._graph is None:
            self._graph = self._record()
        for _ in range(count):
            self._graph.replay()

    def _record(self) -> Any:
        before = [t.clone() for t in (self._state, self._x)]
        self._launch_step()  # compiles: a recording must not
        for tensor, value in zip((self._state, self._x), before, strict=True):
            tensor.copy_(value)
        return recorded(self._launch_step, self.weights.device)

    def _launch_step(self) -> None:
        schedule = self.weights.config.schedule
        following = (*schedule[1:], schedule[-1])  # nothing follows the last: it asks for itself
        for slot, (block, next_block) in enumerate(zip(schedule, following, strict=True)):
            self._launch_attention(slot, block)
            self._launch_feed_forward(block, next_block)
        self._launch_choice()

    def _launch_attention(self, slot: int, block: int) -> None:
        """Stages `query`, `attend` and `output` of a position of the schedule."""
        weights, attention = self.weights, self.geometry.attention
        qkv, output = weights.qkv[block], weights.output[block]
        gate_up, down = weights.gate_up[block], weights.down[block]
        cache_place = (self._address, self._capacity, slot)
        programs = _programs(qkv.rows // 2)
        step.query_kernel[(programs,)](
            qkv.codes,
            scales_of(qkv),
            self._x,
            weights.attention_norms[block],
            weights.config.rms_norm_eps,
            self._position,
            self.cos,
            self.sin,
            *cache_place,
            self._qkv,
            *_ahead(gate_up),
            AHEAD=self._ahead,
            KV=self.kv,
            HEADS=attention["HEADS"],
            KV_HEADS=attention["KV_HEADS"],
            HEAD_DIM=attention["HEAD_DIM"],
            COLS=weights.config.hidden_size,
            KIND=qkv.kind,
            WARPS=STAGE_WARPS,
            PROGRAMS=programs,
            WAIT=self._wait,
            **self._launch,
        )
        step.attention_kernel[(attention["HEADS"] * attention["SPLITS"], 1)](
            self._position,
            *cache_place,
            self._qkv,
            softmax_scale(weights),
            self._partial,
            self._attended,
            KV=self.kv,
            WARPS=ATTENTION_WARPS,
            WAIT=self._wait,
            **attention,
            **(self._launch | {"num_warps": ATTENTION_WARPS}),
        )
        step.output_kernel[(self._output_programs,)](
            output.codes,
            scales_of(output),
            self._partial,
            self._position,
            self._attended,
            self._x,
            self._middle,
            *_ahead(down),
            AHEAD=self._ahead,
            HIDDEN=weights.config.hidden_size,
            KIND=output.kind,
            WARPS=STAGE_WARPS,
            PROGRAMS=self._output_programs,
            WAIT=self._wait,
            **self.geometry.merging,
            **self._launch,
        )

    def _launch_feed_forward(self, block: int, next_block: int) -> None:
        """Stages `gate_up` and `down`; meanwhile the next block's weights are asked for."""
        weights = self.weights
        gate_up, down = weights.gate_up[block], weights.down[block]
        inner = weights.config.intermediate_size
        programs = _programs(inner)
        step.gate_up_kernel[(programs,)](
            gate_up.codes,
            scales_of(gate_up),
            self._middle,
            weights.ffn_norms[block],
            weights.config.rms_norm_eps,
            self._inner,
            *_ahead(weights.qkv[next_block]),
            AHEAD=self._ahead,
            INNER=inner,
            COLS=weights.config.hidden_size,
            KIND=gate_up.kind,
            WARPS=STAGE_WARPS,
            PROGRAMS=programs,
            WAIT=self._wait,
            **self._launch,
        )
        step.project_kernel[(self._output_programs,)](
            down.codes,
            scales_of(down),
            self._inner,
            self._middle,
            self._x,
            OUTPUTS=weights.config.hidden_size,
            COLS=inner,
            KIND=down.kind,
            WARPS=STAGE_WARPS,
            PROGRAMS=self._output_programs,
            WAIT=self._wait,
            **self._launch,
        )

    def _launch_choice(self) -> None:
        """The head, and the choice of the next token from what it gives."""
        weights = self.weights
        head, embedding = weights.head, weights.embedding
        step.candidate_kernel[(self._head_programs,)](
            head.codes,
            scales_of(head),
            self._x,
            weights.final_norm,
            weights.config.rms_norm_eps,
            self.logits,
            self._candidates,
            self._temperature,
            self._seed,
            self._position,
            VOCAB=head.rows,
            COLS=head.cols,
            KIND=head.kind,
            WARPS=STAGE_WARPS,
            PROGRAMS=self._head_programs,
            WAIT=self._wait,
            **self._launch,
        )
        step.finish_kernel[(1,)](
            self._candidates,
            self._position,
            self._step,
            self.tokens,
            self.logprobs,
            embedding.codes,
            scales_of(embedding),
            self._x,
            VOCAB=head.rows,
            COLS=embedding.cols,
            KIND=embedding.kind,
            PROGRAMS=self._head_programs,
            CANDIDATE_BLOCK=power_of_two(self._head_programs),
            BLOCK=power_of_two(embedding.cols),
            WAIT=self._wait,
            **self._launch,
        )


class PersistentSteps(Steps):
    """Tier `persistent`: one cooperative launch.

    Args:
        programs: of the grid, at most; None takes one per multiprocessor.
        warps: of a program.
    """

    def __init__(
        self,
        *args: Any,
        programs: int | None = None,
        warps: int | None = None,
    ) -> None:
        super().__init__(*args)
        device = self.weights.device
        on_gpu = device.type == "cuda"
        if programs is None:
            programs = (
                torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
            )
        # one without a share of some vector could be left behind: nobody would wait for it
        config = self.weights.config
        programs = min(programs, config.hidden_size, config.intermediate_size)
        self.programs = programs
        self.warps = warps or PERSISTENT_WARPS
        self._wait = "grid" if on_gpu else "alone"
        self._launch: dict[str, Any] = {"num_warps": self.warps}
        if on_gpu:
            self._launch["launch_cooperative_grid"] = True
        size = vector_size(config)
        stride = grid_sync.COPY_STRIDE.value
        if size > stride:
            raise NotTaken(
                f"[load] tier 'persistent' takes vectors of {stride} elements, got {size}"
            )
        shape = (grid_sync.copies(self._wait), stride)
        self._vectors = torch.zeros(shape, dtype=torch.int64, device=device)
        self._candidates = torch.zeros(
            programs, CANDIDATE_FIELDS, dtype=torch.float32, device=device
        )
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._epoch = 1  # of the next launch; those before it are in the vectors
        self._state = torch.zeros(3, dtype=torch.int32, device=device)

    def _run(
        self, cache: CudaCache, token_id: int, count: int, temperature: float, seed: int
    ) -> None:
        weights = self.weights
        self._state.copy_(torch.tensor([token_id, cache.length, cache.capacity]))
        self._counter.zero_()
        used = count * (5 * len(self.schedule) + 1)
        if self._epoch + used >= 1 << 31:  # words of long ago must not be taken for new ones
            self._vectors.zero_()
            self._epoch = 1
        first_epoch, self._epoch = self._epoch, self._epoch + used
        matrices = [
            getattr(weights, name)
            for name in ("qkv", "output", "gate_up", "down", "embedding", "head")
        ]
        operands = [t for matrix in matrices for t in (matrix.codes, scales_of(matrix))]
        persistent.persistent_kernel[(self.programs,)](
            count,
            self._state,
            self.schedule,
            len(self.schedule),
            cache.data,
            self.tokens,
            self.logprobs,
            self._counter,
            first_epoch,
            self._vectors,
            self._candidates,
            self.logits,
            self.cos,
            self.sin,
            weights.attention_norms,
            weights.ffn_norms,
            weights.final_norm,
            *operands,
            weights.config.rms_norm_eps,
            softmax_scale(weights),
            float(temperature),
            seed,
            **self.constants(),
            **self._launch,
        )

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments of the kernel."""
        config = self.weights.config
        names = ("qkv", "output", "gate_up", "down", "embedding", "head")
        return {
            "HIDDEN": config.hidden_size,
            "INNER": config.intermediate_size,
            "VOCAB": config.vocab_size,
            **self.geometry.attention,
            **{f"{name.upper()}_KIND": getattr(self.weights, name).kind for name in names},
            "WARPS": self.warps,
            "PROGRAMS": self.programs,
            "CANDIDATE_BLOCK": power_of_two(self.programs),
            "SHARE_BLOCK": power_of_two(-(-config.hidden_size // self.programs)),
            "WAIT": self._wait,
        }


def _ahead(matrix: Matrix) -> tuple[Tensor, int]:
    """A matrix as kernels take what they request ahead of its use: in units of 16 bytes."""
    aligned = matrix.codes.data_ptr() % 16 == 0
    return matrix.codes, matrix.codes.nbytes if aligned else 0


def _programs(rows: int) -> int:
    return -(-rows // STAGE_WARPS)


def _triton_dtype(kv_format: str) -> Any:
    import triton.language as tl

    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return dtypes[FORMATS[kv_format]]
