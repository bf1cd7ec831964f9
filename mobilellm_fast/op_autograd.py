"""The gradient of an op: of its GPU kernel where that fits, else of a function of torch.

One node of autograd per call. Seen as an operator, it is what the dispatcher runs above autograd,
and goes on to operators below; unwatched (`op_watch`) it goes to their functions.
Transforms of functions (`torch.func`) and torch's forward mode see the function of torch instead.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .op_watch import function_transform, has_tangent, is_plain, is_watched

_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad


class Plan(NamedTuple):
    """How calls of one signature are computed.

    Args:
        run: what computes the op.
        save: what returns its result and, behind it, what the derivative wants to be saved; or
            None.
        places: which gradient of the kernel belongs to each argument, None if none does; None
            instead if there is no kernel.
        by_kernel: whether `run` is a GPU's kernel.
    """

    run: Callable
    save: Callable | None
    places: tuple[int | None, ...] | None
    by_kernel: bool


class Derivative:
    """The gradient of an op.

    Args:
        stem: its name.
        op: the operator.
        takes: whether the kernels take a call's arguments.
        reference: the op in functions of torch.
        function: what to differentiate instead, or None.
        once: what is faster to differentiate once, or None.
    """

    def __init__(
        self,
        stem: str,
        op: Any,
        takes: Callable,
        reference: Callable,
        function: Callable | None,
        once: Callable | None,
    ) -> None:
        self.op, self.takes, self.reference = op, takes, reference
        self.function = function or reference
        self.once = once or self.function
        self.kernel = self.kernel_op = self.save = self.save_op = None
        self.order: tuple[int, ...] = ()
        self.first_saved = 0  # of what `save` returns
        # not the schema's, which has numbers for dtypes
        self.defaults = tuple(p.default for p in inspect.signature(reference).parameters.values())
        members = {
            "forward": staticmethod(self._forward),
            "backward": staticmethod(self._backward),
        }
        node = type(stem, (torch.autograd.Function,), members)
        # `Function.apply` looks for function transforms first; `dispatched` has done so
        self.apply = super(torch.autograd.Function, node).apply

    def add_kernel(self, kernel: Callable, op: Any, order: tuple[int, ...] | None) -> None:
        """Use a kernel, and the operator of it; see `register` for the order of its results."""
        count, grads = len(op._schema.returns), len(self.op._schema.returns)
        self.kernel, self.kernel_op = kernel, op
        self.order = order or tuple(range(count))

        def fake(*args: Any) -> Any:
            like = {
                j: args[grads + i]
                for i, j in enumerate(self._places(args[grads:]))
                if j is not None
            }
            found = [torch.empty_like(like[j]) for j in range(count)]
            return found[0] if count == 1 else tuple(found)

        torch.library.register_fake(op, fake)

    def add_saving(self, save: Callable, op: Any, wants_result: bool) -> None:
        """Run this forward, and the operator of it, where the kernel will want what it saves.

        A result that the kernel does not want is not kept: it may be changed in place.
        """
        self.save, self.save_op, self.first_saved = save, op, 0 if wants_result else 1

    def plan(self, run: Callable, args: tuple, by_kernel: bool) -> Plan:
        """Plan calls of the signature of these arguments, of which `run` is the forward."""
        if self.kernel is None or not self.takes(args):
            return Plan(run, None, None, by_kernel)
        return Plan(run, self.save, self._places(self._filled(args)), by_kernel)

    def call(self, plan: Plan, args: tuple) -> Any:
        """Compute the op for plain tensors, unwatched."""
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return self.apply(plan, *self._filled(args))
        return plan.run(*args)

    def dispatched(self, *args: Any) -> Any:
        """Compute the op above autograd, as the dispatcher's kernel."""
        wanted = torch.is_grad_enabled() and _any_requires_grad(*args)
        if (wanted and function_transform() is not None) or has_tangent(args):
            return self._transparent(args)
        if wanted:
            return self.apply(None, *self._filled(args))
        with _below_autograd():
            return self.op(*args)

    def _transparent(self, args: tuple) -> Any:
        """Compute the op of torch's operators alone, which transforms of functions see through."""
        out = self.function(*args)
        if self.function is self.reference:
            return out
        rounded = self.op(*(a.detach() if isinstance(a, Tensor) else a for a in args))
        return out + (rounded - out).detach()

    def _filled(self, args: tuple) -> tuple:
        return args + self.defaults[len(args) :]  # the dispatcher leaves out what is a default

    def _forward(self, ctx: Any, plan: Plan | None, *args: Any) -> Any:
        ctx.plan = plan
        ctx.args = [Tensor if isinstance(a, Tensor) else a for a in args]
        saves = False
        if plan is not None:
            saves = plan.save is not None
            found = plan.save(*args) if saves else plan.run(*args)
        else:
            saves = self.save_op is not None and self.takes(args)
            with _below_autograd():
                found = (self.save_op if saves else self.op)(*args)
        saved = found[self.first_saved :] if saves else ()
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)), *saved)
        return found[0] if saves else found

    def _backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if a is Tensor else a for a in ctx.args]
        saved = tuple(tensors)
        wanted = ctx.needs_input_grad[1:]
        direct = ctx.plan is not None and not is_watched() and is_plain(grads)
        places = None
        if self.kernel is not None and not torch.is_grad_enabled():  # else of gradients, too
            places = ctx.plan.places if direct else self._places_if_taken(grads, args, saved)
        if places is None or any(w and j is None for w, j in zip(wanted, places, strict=True)):
            return (None, *self._by_torch(grads, args, wanted))
        found = (self.kernel if direct else self.kernel_op)(*grads, *args, *saved)
        if isinstance(found, Tensor):
            found = (found,)
        return (None, *[found[j] if w else None for w, j in zip(wanted, places, strict=True)])

    def _places(self, args: Iterable[Any]) -> tuple[int | None, ...]:
        """For each argument, which gradient of the kernel is its own: floating ones in order."""
        order = iter(self.order)
        floating = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
        return tuple(next(order, None) if is_floating else None for is_floating in floating)

    def _places_if_taken(self, grads: tuple, args: list, saved: tuple) -> tuple | None:
        fits = bool(saved) == (self.save is not None) and self.takes((*grads, *args))
        return self._places(args) if fits else None

    def _by_torch(self, grads: tuple, args: list, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        create_graph = torch.is_grad_enabled()
        places = [i for i, needed in enumerate(wanted) if needed]
        with torch.enable_grad():
            for i in places:
                args[i] = args[i].view_as(args[i])  # distinct, even if one tensor came twice
            out = (self.function if create_graph else self.once)(*args)
            inputs = [args[i] for i in places]
            found = torch.autograd.grad(out, inputs, grads, create_graph=create_graph)
        by_place = dict(zip(places, found, strict=True))
        return [by_place.get(i) for i in range(len(args))]
