"""Whether a call may go straight to its kernel, or somebody has to see it as an operator.

Torch's dispatcher shows an operator to whoever asked: compilers, counters, profilers, function
transforms. It costs more than the launch of a short kernel, so a call that nobody watches skips it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
function_transform = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled
_VALUES = frozenset((type(None), int, float, str, torch.dtype))


def is_watched() -> bool:
    """Tell if anything follows operators: a mode, a tracer, a profiler, forward derivatives."""
    return bool(
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or function_transform() is not None
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _profiled()
    )


def has_tangent(values: Iterable[Any]) -> bool:
    """Tell if torch's forward-mode differentiation follows any of these."""
    if forward_ad._current_level < 0:
        return False
    return any(
        isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values
    )


def is_plain(values: Iterable[Any]) -> bool:
    """Tell if all tensors among these are torch's own, whose data are simply there."""
    return all(type(v) in (Tensor, Parameter) or not isinstance(v, Tensor) for v in values)


def signature(args: Iterable[Any]) -> tuple | None:
    """What checks and the choice of a kernel depend on: dtypes, shapes, devices and other values.

    None stands for arguments of other kinds, and for tensors without data.
    """
    found = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if arg.is_meta:  # the operator computes its shape
                return None
            found += (arg.dtype, arg.shape, arg.device)
        elif kind in _VALUES:
            found.append(arg)
        else:
            return None
    return tuple(found)
