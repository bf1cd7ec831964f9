"""Launch kernels without a GPU, by a driver that loads nothing and writes down what it is told.

Interpreted kernels are not launched, so this runs in a process of its own. Each launch is made
twice: what Triton hands to the driver, and a `Launch` when repeated, have to be the same.
Prints one line of JSON per launcher: its launches, in the words of both.
"""

import itertools
import json
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp

launched = []
handles = itertools.count()


class Launcher:
    """Stands for Triton's, which compiles C: keeps what it is called with."""

    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, *args):
        # the three between are for hooks
        launched.append((self.name, *args[:6], *map(plain, args[9:])))


def plain(value):
    """What a launch takes of an argument: a tensor's address, a descriptor's fields."""
    if hasattr(value, "block_shape"):
        fields = [list(getattr(value, name)) for name in ("shape", "strides", "block_shape")]
        return ["descriptor", value.base.data_ptr(), *fields, value.padding]
    return value.data_ptr() if hasattr(value, "data_ptr") else value


class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, next(handles), 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind):
        return ty_to_cpp(kind)


triton.runtime.driver.set_active(Driver())

from mobilellm_fast.kernels import gqa_attention, launch, rms_norm, rope, swiglu  # noqa: E402


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def calls():
    x, weight = half(4, 64), half(64)
    q, k = half(2, 8, 4, 64), half(2, 8, 2, 64)
    lse, angles = torch.zeros(2, 4, 8), torch.zeros(8, 32)
    matrices = half(128, 64), half(128, 64)
    gate, odd = half(4, 128), half(q.numel() + 1)[1:].view(q.shape)
    return {
        "rms_norm": lambda: rms_norm.rms_norm(x, weight, 1e-5),
        "rms_norm_backward": lambda: rms_norm.rms_norm_backward(x, x, weight, 1e-5, x),
        "add_rms_norm": lambda: rms_norm.add_rms_norm(x, x, weight, 1e-5),
        "rope": lambda: rope.rope(q, angles, angles),
        "rope_backward": lambda: rope.rope_backward(q, angles, angles),
        "swiglu": lambda: swiglu.swiglu(x, *matrices),
        "swiglu_saving": lambda: swiglu.swiglu_saving(x, *matrices),
        "swiglu_backward": lambda: swiglu.swiglu_backward(gate, x, *matrices, gate, gate),
        "unaligned": lambda: rope.rope(odd, angles, angles),
        "mixed_tables": lambda: rope.rope(q, angles, angles.bfloat16()),
        "gqa_attention": lambda: gqa_attention.forward(q, k, k, 0.125),
        "gqa_attention_backward": lambda: gqa_attention.backward(q, q, k, k, q, lse, 0.125),
    }


def main():
    once = launch.Launch.__call__
    pairs = []

    def twice(self, *tensors):
        launched.clear()
        once(self, *tensors)
        once(self, *tensors)
        pairs.append((list(launched), self._run is not None))

    launch.Launch.__call__ = twice
    for name, call in calls().items():
        pairs.clear()
        call()
        print(json.dumps({"name": name, "launches": pairs}))


if __name__ == "__main__":
    main()
