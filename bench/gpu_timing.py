"""Times work on a GPU (or, to try everything out, on a CPU): in turns, by events or the clock."""

import gc
import statistics
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from timing import Work

LEAST_ROUNDS = 3  # however little time there is
COPY_NBYTES = 2 << 30  # of the buffer whose copy measures bandwidth: far beyond any L2 cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleave(works: dict[str, Work], rounds: int, seconds: float) -> dict[str, Exception]:
    """Measure works in turns, A B A B; a first round only warms up.

    A work that fails is left out of the rest, and the others go on.

    Args:
        works: by name; each gets the seconds of its turns.
        rounds: how many to count at most.
        seconds: no further round starts after so long, but `LEAST_ROUNDS` are counted.

    Returns:
        What went wrong, by name.
    """
    faults: dict[str, Exception] = {}

    def round(counted: bool) -> None:
        for name, work in works.items():
            if name in faults:
                continue
            try:
                taken = work.run()
            except Exception as error:
                faults[name] = error
                continue
            if counted:
                work.seconds.append(taken)

    round(False)
    gc.collect()
    gc.disable()
    started = perf_counter()
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and perf_counter() - started > seconds:
                break
            round(True)
    finally:
        gc.enable()
    return faults


def describe(error: BaseException) -> str:
    """Say in one line what an exception was and where, with the innermost line of code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{place}"


def repeated(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 5e-3
) -> tuple[Callable[[], float], dict]:
    """Make a turn of short operations that run one after another, each on data of its own.

    On a GPU they are captured in one CUDA graph, which is replayed as often as fills a turn, so
    that a turn times the device and not the launches. What cannot be captured is launched call by
    call.

    Args:
        calls: the operation on each set of data in rotation, together larger than the L2 cache.
        device: where they run.
        seconds: of a turn.

    Returns:
        The turn, which returns the seconds of one call; and facts: whether it was `graphed`.
    """
    for call in (*calls, *calls[:1]):  # compiles, tunes, and makes buffers that calls keep
        call()
    if device.type != "cuda":
        return _clocked(calls), {"graphed": False}
    synchronize(device)
    facts = {"graphed": True}
    try:
        replay = graph(lambda: [call() for call in calls]).replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        facts = {"graphed": False, "not_graphed": describe(error)}

        def replay() -> None:
            for call in calls:
                call()

    replay()
    count = max(1, min(200, round(seconds / max(_events(replay, 2), 1e-6))))
    return lambda: _events(replay, count) / len(calls), facts


def graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture what `work` launches, after it has run on a side stream as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = work()
    captured.outputs = kept  # memory that the graph writes
    return captured


def _events(work: Callable[[], object], count: int) -> float:
    """Return the device's seconds of one of `count` runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / count


def _clocked(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    def run() -> float:
        started = perf_counter()
        for call in calls:
            call()
        return (perf_counter() - started) / len(calls)

    return run


def copies(nbytes: int, device: torch.device, l2_nbytes: int) -> int:
    """Say how many sets of data of a size exceed twice the L2 cache."""
    return 2 if device.type != "cuda" else max(2, min(192, 1 + 2 * l2_nbytes // max(nbytes, 1)))


def copy_bandwidth(device: torch.device, nbytes: int = COPY_NBYTES) -> float:
    """Measure a large copy within the device's memory, in bytes read and written per second."""
    nbytes = nbytes if device.type == "cuda" else 1 << 20
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run, _ = repeated([lambda: target.copy_(source)], device, 0.02)
    return 2 * nbytes / statistics.median([run() for _ in range(7)])
