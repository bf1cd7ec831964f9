"""Counters for kernels whose program that finishes last has more to do than the others."""

import torch
from torch import Tensor

GRAPH_COUNTERS = 1 << 16  # that are set aside for captured graphs at once

_eager_counters: dict[tuple[torch.device, int], Tensor] = {}
_graph_counters: dict[torch.device, list[Tensor]] = {}


def counters_of(device: torch.device, count: int) -> Tensor:
    """Return zeros that no other launch uses at the same time; each launch leaves zeros.

    Launches on one stream take turns. Graphs may be replayed on any stream, so each launch that is
    captured gets counters of its own, which are never given back.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    chunks = _graph_counters.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        if not chunks or len(chunks[-1]) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)  # a node of the graph
        given, rest = chunks[-1].split([count, len(chunks[-1]) - count])
        chunks[-1] = given
        chunks.append(rest)
        return given
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _eager_counters or len(_eager_counters[key]) < count:
        _eager_counters[key] = torch.zeros(max(count, 512), dtype=torch.int32, device=device)
    if not chunks or len(chunks[-1]) < count:
        chunks.append(torch.zeros(GRAPH_COUNTERS, dtype=torch.int32, device=device))
        # a graph does not wait for this stream; all of the GPU cannot be waited for while another
        # thread captures one
        torch.cuda.current_stream(device).synchronize()
    return _eager_counters[key]
