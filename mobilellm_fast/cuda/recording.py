"""Launches recorded as a CUDA graph, whatever other threads and other GPUs do meanwhile."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

_one_at_a_time = threading.Lock()  # in a process, as torch demands


def recorded(launches: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Record what is launched on the current GPU; all of it has been launched once before.

    Args:
        launches: nothing of it is run.
        device: the current GPU.
    """
    with _one_at_a_time:
        torch.cuda.synchronize(device)
        stream, graph = _stream_of(device), torch.cuda.CUDAGraph()
        # Threads of other models may allocate memory, which "global" forbids them. The stream is
        # entered here, too, since torch does not leave it if the recording fails.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            launches()
    return graph


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return a GPU's stream to record on; torch's own is of the GPU that recorded first."""
    return torch.cuda.Stream(device)
