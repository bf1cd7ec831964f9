"""How a reference function becomes a torch operator, `torch.ops.mobilellm_fast.<stem>`.

An op has the signature, the documentation and the gradient of its reference, argument checks, and a
kernel per device; where no kernel takes the inputs (other dtypes, other devices, no Triton) the
reference runs. A GPU's derivative, and its forward that saves for it, are operators, too, since
compilers see through none of them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import op_cuda
from .op_checks import FLOATS

GPU = "cuda"  # torch calls AMD's so, too


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
    """Make a reference function an op, whose `has_gpu_kernel(*args)` tells where it would run.

    Args:
        reference: the specification; its name and signature become the op's.
        check: called with the arguments, raises MobileLLMError for wrong ones.
        cpu: called with contiguous CPU tensors, the floating ones float32.
        cuda: called with contiguous tensors on one GPU, with that the current one.
        cuda_backward: `(*grads, *arguments)`, with `cuda_saving` `(grad, *arguments, *results)`,
            -> gradients of the first floating tensors among the arguments; called as `cuda` is.
            Gradients of gradients, and those of further tensors, come from the reference.
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
    name = f"mobilellm_fast::{reference.__name__}"
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
        if any(t.dtype in FLOATS[1:] for t in _tensors(args)):
            return run_reference(*args)
        return cpu(*(a.detach().contiguous() if isinstance(a, Tensor) else a for a in args))

    def run_cuda(*args: Any) -> Any:
        return _on_gpu(cuda)(*args) if takes(args) else run_reference(*args)

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(name, run_reference, mutates_args=(), schema=schema)
    if cpu is not None:
        op.register_kernel("cpu")(run_cpu)
    if cuda is not None:
        op.register_kernel(gpu)(run_cuda)
    op.register_fake(fake)

    derivative = _Derivative(differentiable or reference, once_differentiable, takes)
    if cuda_backward is not None:
        derivative.add_kernel(
            f"{name}_backward",
            cuda_backward,
            grads=_results_of(schema),
            order=cuda_gradients,
            wants_saved=cuda_saving is not None,
        )
    saving = None
    if cuda_saving is not None:
        saving = _gpu_op(f"{name}_saving", cuda_saving)
        saving.register_fake(lambda *args: (fake(*args), *fake_saved(*args)))
        saving.register_autograd(derivative.backward, setup_context=derivative.save_all)
    op.register_autograd(derivative.backward, setup_context=derivative.save_arguments)

    @functools.wraps(reference)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if saving is not None and torch.is_grad_enabled():
            given = (*args, *kwargs.values())
            if any(t.requires_grad for t in _tensors(given)) and takes(given):
                return saving(*args, **kwargs)[0]
        return op(*args, **kwargs)

    checked.has_gpu_kernel = lambda *args: cuda is not None and takes(args)
    return checked


class _Derivative:
    """The derivative of an op: a kernel where it fits, else that of a function of torch.

    Args:
        function: the function of torch.
        once: a faster one for first derivatives, or None.
        takes: whether the kernels take a call's arguments.
    """

    def __init__(self, function: Callable, once: Callable | None, takes: Callable) -> None:
        self.function, self.once, self.takes = function, once or function, takes
        self.kernel, self.order, self.wants_saved = None, (), False

    def add_kernel(
        self,
        name: str,
        kernel: Callable,
        grads: int,
        order: tuple[int, ...] | None,
        wants_saved: bool,
    ) -> None:
        """Use `kernel`, which takes that many gradients; see `register` for the rest."""
        count = _results_of(torch.library.infer_schema(kernel, mutates_args=()))
        self.order, self.wants_saved = order or tuple(range(count)), wants_saved
        self.kernel = _gpu_op(name, kernel)

        @self.kernel.register_fake
        def fake(*args: Any) -> Any:
            args = args[grads:]
            like = dict(zip(self.order, self._places(args), strict=True))
            found = [torch.empty_like(args[like[i]]) for i in range(count)]
            return found[0] if count == 1 else tuple(found)

    def save_arguments(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.save_all(ctx, inputs, ())

    def save_all(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*_tensors(inputs), *output)
        ctx.args = [Tensor if isinstance(arg, Tensor) else arg for arg in inputs]

    def backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if arg is Tensor else arg for arg in ctx.args]
        saved = tuple(tensors)
        if saved:
            grads = grads[:1]  # what is saved is no result
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        if self._fits(grads, args, saved, wanted):
            found = self.kernel(*grads, *args, *saved)
            found = [found] if isinstance(found, Tensor) else found
            places, found = self._places(args), [found[i] for i in self.order]
        else:
            places, found = wanted, self._by_torch(grads, args, wanted)
        by_place = dict(zip(places, found, strict=True))
        return tuple(by_place.get(i) if i in wanted else None for i in range(len(args)))

    def _fits(self, grads: tuple, args: list, saved: tuple, wanted: list[int]) -> bool:
        fits = self.kernel is not None and bool(saved) == self.wants_saved
        fits = fits and not torch.is_grad_enabled()  # else gradients of gradients are wanted
        return fits and set(wanted) <= set(self._places(args)) and self.takes((*grads, *args))

    def _places(self, args: Iterable[Any]) -> list[int]:
        floating = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
        return [i for i, is_floating in enumerate(floating) if is_floating][: len(self.order)]

    def _by_torch(self, grads: tuple, args: list, wanted: list[int]) -> tuple[Tensor, ...]:
        create_graph = torch.is_grad_enabled()
        args = list(args)
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].view_as(args[i])  # distinct, even if one tensor came twice
            out = (self.function if create_graph else self.once)(*args)
            inputs = [args[i] for i in wanted]
            return torch.autograd.grad(out, inputs, grads, create_graph=create_graph)


def _gpu_op(name: str, function: Callable) -> Any:
    schema = torch.library.infer_schema(function, mutates_args=())
    return torch.library.custom_op(
        name, _on_gpu(function), mutates_args=(), schema=schema, device_types=GPU
    )


def _on_gpu(function: Callable) -> Callable:
    """Call with plain contiguous tensors, their device the current one."""

    def run(*args: Any) -> Any:
        args = [a.detach().contiguous() if isinstance(a, Tensor) else a for a in args]
        with torch.cuda.device(next(_tensors(args)).get_device()):
            return function(*args)

    return run


def _results_of(schema: str) -> int:
    return schema.split("->")[1].count("Tensor")


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    return (arg for arg in args if isinstance(arg, Tensor))


def _run_contiguous(function: Callable, *args: Any) -> Any:
    out = function(*args)
    return tuple(t.contiguous() for t in out) if isinstance(out, tuple) else out.contiguous()
