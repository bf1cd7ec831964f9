"""Triton kernels on machines without a GPU: interpreted by Triton, on CPU tensors."""

import functools
import importlib.util
import os

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
