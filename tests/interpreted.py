"""Triton kernels on machines without a GPU: interpreted by Triton, on CPU tensors."""

import functools
import importlib.util
import inspect
import os
from types import ModuleType
from unittest import mock

import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = not HAS_GPU and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if HAS_GPU else "cpu"


@functools.cache
def interpret_kernels() -> None:
    """Make `triton.jit` interpret; before it is used, so before any kernel is imported."""
    if not INTERPRETED:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        # its scalars are arrays of one element, which NumPy 2.4 no longer takes for numbers
        patch(tensor, scope)
        if tensor is tl.tensor:
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


@functools.cache
def ops_with_kernels() -> tuple[ModuleType, str]:
    """Return a module `ops` whose ops run kernels here, and what its operators' names end in."""
    from mobilellm_fast import op_cuda, op_registry, ops  # imports Triton, in the end

    if HAS_GPU:
        return ops, ""
    original = op_registry.register

    def register(reference, **options):
        def renamed(*args, **kwargs):
            return reference(*args, **kwargs)

        renamed.__name__ = f"{reference.__name__}_interpreted"
        renamed.__signature__ = inspect.signature(reference)
        return original(renamed, **options | {"cpu": None})

    with (
        mock.patch.object(op_registry, "GPU", "cpu"),
        mock.patch.object(op_registry, "register", register),
        mock.patch.object(op_cuda, "takes_one_half", op_cuda.takes_one_dtype),
    ):
        spec = importlib.util.find_spec("mobilellm_fast.ops")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module, "_interpreted"
