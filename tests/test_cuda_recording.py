"""How steps are recorded as CUDA graphs, by what is asked of torch: no GPU is needed."""

import threading
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from mobilellm_fast.cuda import recording

SECOND = torch.device("cuda", 1)


class FakeCuda:
    """Stands in for what `recorded` calls; as torch does, a graph that fails keeps its stream."""

    def __init__(self):
        self.current, self.modes, self.running, self.most = "default", [], 0, 0

    def Stream(self, device):
        return f"stream of {device}"

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.modes.append(capture_error_mode)
        self.current = stream
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield
        finally:
            self.running -= 1
        self.current = "default"


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    recording._stream_of.cache_clear()
    yield fake
    recording._stream_of.cache_clear()


def test_a_recording_is_on_a_stream_of_its_gpu(cuda):
    """torch's own stream is of the GPU that recorded first, and would make that the current one."""
    for device in (torch.device("cuda", 0), SECOND):
        streams = []
        recording.recorded(lambda seen=streams: seen.append(cuda.current), device)
        assert streams == [f"stream of {device}"]


def test_other_threads_may_allocate_meanwhile(cuda):
    recording.recorded(lambda: None, SECOND)
    assert cuda.modes == ["thread_local"]


def test_a_recording_that_fails_leaves_its_stream(cuda):
    def fails():
        raise torch.OutOfMemoryError("in the middle")

    with pytest.raises(torch.OutOfMemoryError):
        recording.recorded(fails, SECOND)
    assert cuda.current == "default"
    recording.recorded(lambda: None, SECOND)  # nor does it keep others from recording


def test_threads_record_in_turns(cuda):
    started = threading.Barrier(3)

    def records():
        started.wait()
        recording.recorded(lambda: threading.Event().wait(0.02), SECOND)

    threads = [threading.Thread(target=records) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cuda.most == 1
