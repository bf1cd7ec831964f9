"""Which ops are timed, on what sizes, and what each has to read and compute at least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from bounds import assert_right
from cases import LINEAR_KINDS, bind_kernel, case_id, make_args, model_cases
from torch import Tensor

from mobilellm_fast import _C, quant
from mobilellm_fast.config import MobileLLMConfig

WEIGHTED = ("linear", "swiglu")
GATED_ELEMENTS = 1_000_000  # of an output times its groups: more is checked on some rows of it
GATED_ROWS = 8  # every so many then, and the second and the last


@dataclass(frozen=True)
class OpCase:
    """An op as a model runs it; `options` are those of `make_args`."""

    preset: str
    stem: str
    sizes: dict
    options: dict

    @property
    def quick(self) -> bool:
        """One of the few that a quick run times: a decode step's largest parts, and no head."""
        few = self.options.get("kind") in (None, "int8", "int4_g32")
        rows = self.sizes.get("rows", self.sizes.get("seq"))
        small = self.sizes.get("outputs", 0) < 10_000 and self.sizes.get("kv_seq", 128) == 128
        wide = self.stem != "linear" or self.sizes["cols"] > self.sizes["outputs"]
        usual = not self.options or _usual(**self.options)
        return self.preset.endswith("-125M") and few and rows == 1 and small and wide and usual

    def __str__(self) -> str:
        parts = (self.preset.removeprefix("MobileLLM-"), self.stem, *self.options.values())
        return "-".join((*parts, case_id(self.sizes)))


def op_cases() -> list[OpCase]:
    """List everything of MobileLLM-125M, and the largest layers of its bigger sisters."""
    cases = []
    for preset in ("125M", "350M", "600M", "1B", "1.5B"):
        name = f"MobileLLM-{preset}"
        for stem, sizes_list in model_cases(MobileLLMConfig.preset(name)).items():
            kinds = [dict(kind=k, activation=a) for k, a in LINEAR_KINDS if _used(k, a)]
            if preset != "125M":
                kinds = [k for k in kinds if k["kind"] in ("int8", "int4_g32")]
                kinds = [k for k in kinds if _usual(**k)]
                if stem != "swiglu":
                    continue
            for sizes in sizes_list:
                for options in kinds if stem in WEIGHTED else [{}]:
                    cases.append(OpCase(name, stem, sizes, options))
    return cases


def _used(kind: str, activation: str) -> bool:
    """Tell whether a format pairs the two: `w8a8` is int8 with int8, the rest groups of 32."""
    return activation != "int8" or kind == "int8"


def _usual(kind: str, activation: str) -> bool:
    """Tell whether inputs are rounded as hidden layers do: no wide groups before 8-bit weights."""
    return activation == {"int8": "int8_g32_plain"}.get(kind, "int8_g32")


def check(case: OpCase, isa: str) -> None:
    """Run an op once and hold its result to the reference.

    Raises:
        AssertionError: it is wrong.
    """
    args = make_args(case.stem, case.sizes, **case.options)
    call, out = bind_kernel(case.stem, args, isa)
    call()
    rows = _gated_rows(args, out)
    if rows is not None:
        args, out = (args[0][rows], *args[1:]), out[rows]
    try:
        assert_right(case.stem, args, out)
    except AssertionError as error:
        raise AssertionError(f"RED: {case} on {isa}, no speed is reported: {error}") from None


def _gated_rows(args: tuple, out: Tensor | tuple) -> list[int] | None:
    """Choose rows of a large result; rows do not depend on each other. None means all."""
    packed = len(args) > 3 and isinstance(args[1], Tensor) and args[1].ndim == 1
    if isinstance(out, tuple) or not packed or len(out) < 5:
        return None
    groups = args[0].shape[1] // quant.GROUP
    some = sorted({*range(0, len(out), GATED_ROWS), 1, len(out) - 1})
    return None if out.numel() * groups < GATED_ELEMENTS else some


def calls(case: OpCase, isas: list[str]) -> dict[str, Callable[[], None]]:
    """Make a function per table that runs the op once, each time with other weights.

    The weights rotate through more than twice the last-level cache, so that they come from
    memory, as a model's do; what has no weights works on one set of arguments, from cache.
    """
    args = make_args(case.stem, case.sizes, **case.options)
    if case.stem not in WEIGHTED:
        return {isa: bind_kernel(case.stem, args, isa)[0] for isa in isas}
    copies = list(_rotation(args))
    functions = {}
    for isa in isas:
        turn = cycle([bind_kernel(case.stem, own, isa)[0] for own in copies])
        functions[isa] = lambda turn=turn: next(turn)()
    return functions


def _rotation(args: tuple) -> Iterator[tuple]:
    """Yield the arguments with copies of the weights, one behind the other as in an engine."""
    weights = [(i, a) for i, a in enumerate(args) if i and isinstance(a, Tensor)]
    each = sum(-(-w.nbytes // quant.ALIGNMENT) * quant.ALIGNMENT for _, w in weights)
    copies = 2 + 2 * _C.last_level_cache_nbytes() // each
    buffer, offset = torch.from_numpy(_C.allocate(copies * each)), 0
    for _ in range(copies):
        own = list(args)
        for i, weight in weights:
            place = buffer[offset : offset + weight.nbytes]
            own[i] = place.view(weight.dtype).view(weight.shape)
            own[i].copy_(weight)
            offset += -(-weight.nbytes // quant.ALIGNMENT) * quant.ALIGNMENT
        yield tuple(own)


def demands(case: OpCase) -> dict:
    """Say what the op reads and writes, and computes, at least.

    Returns:
        `nbytes`, `operations` (a product and its sum are two), `source` of the bytes ("memory" or
        "l2") and `peak`, the unit that computes ("int8" or "fp32").
    """
    args = make_args(case.stem, case.sizes, **case.options)
    tensors = [a for a in args if isinstance(a, Tensor)]
    nbytes = sum(t.nbytes for t in tensors)
    elements = args[0].numel()
    size = case.sizes
    operations, result = {
        "rms_norm": lambda: (4 * elements, 4 * elements),
        "quantize_per_token": lambda: (3 * elements, elements),
        "rope": lambda: (3 * elements, 4 * elements),
        "gqa_attention": lambda: (4 * _products(size), 4 * elements),
        "linear": lambda: (2 * elements * size["outputs"], 4 * size["rows"] * size["outputs"]),
        "swiglu": lambda: (4 * elements * size["inner"], 4 * size["rows"] * size["inner"]),
    }[case.stem]()
    integer = case.options.get("activation", "float") != "float"
    return {
        "nbytes": nbytes + result,
        "operations": operations,
        "source": "memory" if case.stem in WEIGHTED else "l2",
        "peak": "int8" if integer else "fp32",
    }


def _products(size: dict) -> int:
    """Count the products in scores: of each query with each key that it sees."""
    pairs = size["batch"] * sum(size["kv_seq"] - i for i in range(size["seq"]))
    return pairs * size["heads"] * size["head_dim"]
