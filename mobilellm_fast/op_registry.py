"""How a reference function becomes a torch operator, `torch.ops.mobilellm_fast.<stem>`.

An op has the signature, the documentation and the gradient of its reference, argument checks, and a
kernel per device; where no kernel takes the inputs (other dtypes, other devices, no Triton) the
reference runs. A GPU's derivative, and its forward that saves for it, are operators, too, since
compilers see through none of them. Calls that nobody watches (`op_watch`) go to the same functions
without torch's dispatcher.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import op_cuda
from .op_autograd import Derivative, Plan
from .op_checks import FLOATS
from .op_watch import is_watched, signature

GPU = "cuda"  # torch calls AMD's so, too
PLANS = 4096  # signatures that an op remembers: more than a program should have

_LIBRARY = torch.library.Library("mobilellm_fast", "FRAGMENT")


def register(
    reference: Callable,
    *,
    check: Callable,
    cpu: Callable | None = None,
    cuda: Callable | None = None,
    cuda_backward: Callable | None = None,
    cuda_gradients: tuple[int, ...] | None = None,
    cuda_saving: Callable | None = None,
    cuda_takes: Callable[[list[Tensor]], bool] = op_cuda.takes_floats,
    fake: Callable | None = None,
    fake_saved: Callable | None = None,
    differentiable: Callable | None = None,
    once_differentiable: Callable | None = None,
) -> Callable:
    """Make a reference function an op; its `by_gpu_kernel(*args)` is None where no GPU's would run.

    Args:
        reference: the specification; its name and signature become the op's.
        check: called with the arguments, raises MobileLLMError for wrong ones. It looks at dtypes,
            shapes and other values than tensors; a signature that has passed is not checked again.
        cpu: called with contiguous CPU tensors, the floating ones float32.
        cuda: called with contiguous tensors on one GPU, with that the current one.
        cuda_backward: `(*grads, *arguments)`, with `cuda_saving` `(grad, *arguments, *results)`
            (the first, the op's own, only if there is a parameter `out`), -> gradients of the first
            floating tensors among the arguments; called as `cuda` is. Gradients of gradients, and
            those of further tensors, come from the reference.
        cuda_gradients: for each of those tensors, which of the gradients is its own; None: they
            come in order.
        cuda_saving: `cuda` for training, where `cuda_backward` wants more than the arguments:
            returns the only result of the op and then what to save beside it.
        cuda_takes: whether the kernels take the floating tensors of a call.
        fake: computes the shape of the result; None runs the reference on fake tensors.
        fake_saved: computes the shapes of what `cuda_saving` saves, as a tuple.
        differentiable: what to differentiate instead of the reference, where rounding hides the
            gradient. Backward recomputes it.
        once_differentiable: a faster function with the same gradient, for where no gradients of
            gradients are wanted.
    """
    stem = reference.__name__
    fake = fake or functools.partial(_run_contiguous, reference)
    gpu = GPU

    def takes(args: Iterable[Any]) -> bool:
        tensors = list(_tensors(args))
        together = all(t.device == tensors[0].device for t in tensors)
        floating = [t for t in tensors if t.is_floating_point()]
        return together and tensors[0].device.type == gpu and cuda_takes(floating)

    def run_reference(*args: Any) -> Any:
        return _run_contiguous(reference, *args)

    def run_cpu(*args: Any) -> Any:
        # kernels are float32's, and take weights that are somewhere
        if any(t.dtype in FLOATS[1:] or not t.numel() for t in _tensors(args)):
            return run_reference(*args)
        return cpu(*(a.detach().contiguous() if isinstance(a, Tensor) else a for a in args))

    on_gpu = None if cuda is None else _on_gpu(cuda)

    def run_cuda(*args: Any) -> Any:
        return on_gpu(*args) if takes(args) else run_reference(*args)

    kernels = {"CompositeExplicitAutograd": run_reference}
    if cpu is not None:
        kernels["CPU"] = run_cpu
    if cuda is not None:
        kernels[gpu.upper()] = run_cuda
    op = _define(stem, reference, kernels, fake)

    derivative = Derivative(stem, op, takes, reference, differentiable, once_differentiable)
    if cuda_backward is not None:
        run = _on_gpu(cuda_backward)
        derivative.add_kernel(
            run, _gpu_op(f"{stem}_backward", cuda_backward, run, gpu), cuda_gradients
        )
    if cuda_saving is not None:
        run = _on_gpu(cuda_saving)
        saving = _gpu_op(f"{stem}_saving", cuda_saving, run, gpu)
        _register_fake(saving, lambda *args: (fake(*args), *fake_saved(*args)))
        wants_result = "out" in inspect.signature(cuda_backward).parameters
        derivative.add_saving(run, saving, wants_result)
    _LIBRARY.impl(stem, derivative.dispatched, "Autograd")

    plans: dict[tuple, Plan] = {}

    def make_plan(key: tuple, args: tuple) -> Plan:
        check(*args)
        if len(plans) >= PLANS:
            plans.clear()
        on_cpu = all(t.device.type == "cpu" for t in _tensors(args))
        if cuda is not None and takes(args):
            plan = derivative.plan(on_gpu, args, by_kernel=True)
        else:
            run = run_cpu if cpu is not None and on_cpu else run_reference
            plan = derivative.plan(run, args, by_kernel=False)
        plans[key] = plan
        return plan

    @functools.wraps(reference)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if kwargs or is_watched() or (key := signature(args)) is None:
            check(*args, **kwargs)
            return op(*args, **kwargs)
        plan = plans.get(key) or make_plan(key, args)
        return derivative.call(plan, args)

    def by_gpu_kernel(*args: Any) -> Any:
        if cuda is None or torch.is_autocast_enabled(gpu):  # which has its own mind about dtypes
            return None
        if is_watched() or (key := signature(args)) is None:
            return checked(*args) if takes(args) else None
        plan = plans.get(key) or make_plan(key, args)
        return derivative.call(plan, args) if plan.by_kernel else None

    checked.by_gpu_kernel = by_gpu_kernel
    return checked


def _define(stem: str, function: Callable, kernels: dict[str, Callable], fake: Callable) -> Any:
    """Define an operator with the schema of a function's annotations, and a kernel per key."""
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(stem + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _LIBRARY.impl(stem, kernel, key)
    op = getattr(torch.ops.mobilellm_fast, stem).default
    if fake is not None:
        _register_fake(op, fake)
    return op


def _gpu_op(stem: str, function: Callable, run: Callable, gpu: str) -> Any:
    return _define(stem, function, {gpu.upper(): run}, None)


def _register_fake(op: Any, fake: Callable) -> None:
    torch.library.register_fake(op, fake, lib=_LIBRARY)


def _on_gpu(function: Callable) -> Callable:
    """Call with contiguous tensors, their device the current one, products in their dtype."""
    gpu = GPU

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled(gpu):
            with torch.autocast(gpu, enabled=False):
                return run(*args)
        args = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        device = next(_tensors(args)).get_device()
        if device < 0 or device == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    return (arg for arg in args if isinstance(arg, Tensor))


def _run_contiguous(function: Callable, *args: Any) -> Any:
    out = function(*args)
    return tuple(_own(t) for t in out) if isinstance(out, tuple) else _own(out)


def _own(result: Tensor) -> Tensor:
    """Make a result contiguous, and no view, which autograd would let nobody change in place."""
    result = result.contiguous()
    return result.detach() if result._is_view() else result
