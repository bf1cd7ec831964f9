"""pytest's part of the benchmarks: options, progress, and what a saved run says of its machine."""

import sys
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path
from time import perf_counter

import package_under_test
import pytest

package_under_test.prefer_installed()
sys.path.insert(0, str(Path(__file__).resolve().parent))


AT_START = pytest.StashKey()  # facts and limits of the machine
GPU_SECONDS = 60  # until a GPU's benchmark is stopped, beside its waiting for compilers
GPU = pytest.StashKey()  # the session of the GPU's benchmarks


def _rounds(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1, got {given}")
    return int(given)


def pytest_addoption(parser):
    group = parser.getgroup("mobilellm_fast")
    group.addoption("--rounds", type=_rounds, default=7, help="turns of each work (default: 7)")
    group.addoption(
        "--smoke",
        action="store_true",
        help="one round of everything, short: shows that it works, not how fast it is",
    )
    group.addoption("--peers-root", type=Path, help="where bench/peers.py installed its peers")
    group.addoption("--model", help="model of the benchmarks of a real one (default: SmolLM2-135M)")
    group.addoption("--dry", action="store_true", help="GPU benchmarks: tiny models on the CPU")
    group.addoption("--ungated", action="store_true", help="GPU: also time what a gate found wrong")
    group.addoption("--missing", action="store_true", help="GPU: skip what the results have")
    group.addoption("--gpu-results", type=Path, help="folder of the GPU's results (bench/results)")


def pytest_collection_modifyitems(config, items):
    for item in items:  # the slowest take minutes: exports, compilers, a cold peer
        if item.path.name.startswith("bench_"):
            seconds = GPU_SECONDS if _of_gpu(item) and not config.getoption("dry") else 1500
            # by a thread: a kernel that hangs cannot be interrupted, so the process ends
            hard = seconds == GPU_SECONDS
            method = "thread" if hard else "signal"
            item.add_marker(pytest.mark.timeout(seconds, method=method, func_only=hard))
    of_gpu = [item for item in items if _of_gpu(item)]
    if of_gpu and "gpu" not in config.getoption("markexpr"):
        items[:] = [item for item in items if not _of_gpu(item)]
        config.hook.pytest_deselected(items=of_gpu)
    elif of_gpu and (reason := _no_gpu(config)):
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def _of_gpu(item) -> bool:
    return item.path.name.startswith("bench_gpu")


def _no_gpu(config) -> str | None:
    """Say why the GPU's benchmarks cannot run; None if they can."""
    if config.getoption("dry"):
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; --dry runs tiny models on the CPU"
    return None


def pytest_collection_finish(session):
    benchmarks = [item for item in session.items if item.path.name.startswith("bench_")]
    if benchmarks and not session.config.getoption("collectonly"):
        import machine

        of_cpu = not all(_of_gpu(item) for item in benchmarks)
        session.config.stash[AT_START] = machine.facts(), machine.limits() if of_cpu else {}


@pytest.fixture(scope="session")
def smoke(pytestconfig) -> bool:
    return pytestconfig.getoption("smoke")


@pytest.fixture(scope="session")
def rounds(pytestconfig, smoke) -> int:
    return 1 if smoke else pytestconfig.getoption("rounds")


@pytest.fixture
def say(pytestconfig):
    """Tell what a long benchmark does now: a function of one text."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    progress = pytestconfig.pluginmanager.getplugin("bench-progress")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            progress.detail(text)

    return tell


@pytest.fixture(scope="session")
def session(request, pytestconfig):
    """What the GPU's benchmarks share; starts the processes that compile for the chosen ones."""
    import gpu_session
    import torch

    dry, folder = pytestconfig.getoption("dry"), pytestconfig.getoption("gpu_results")
    if folder is None:
        folder = Path(tempfile.mkdtemp()) if dry else Path(__file__).resolve().parent / "results"
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    progress = pytestconfig.pluginmanager.getplugin("bench-progress")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            progress.detail(text)

    options = (pytestconfig.getoption(name) for name in ("ungated", "missing"))
    made = pytestconfig.stash[GPU] = gpu_session.Session(folder, dry, *options, say)
    cases = [item.callspec.params["case"] for item in request.session.items if _of_gpu(item)]
    made.start_all(cases)
    torch.manual_seed(0)
    with torch.no_grad():
        yield made
    made.close()


def pytest_terminal_summary(terminalreporter, config):
    if (gpu := config.stash.get(GPU, None)) is not None:
        import gpu_results

        terminalreporter.section("goals of the GPU")
        for line in gpu_results.table(gpu.results.data):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{gpu.results.about['device']}: {gpu.results.path}")


def pytest_configure(config):
    if config.getoption("dry"):
        from interpreted import interpret_kernels

        interpret_kernels()  # before anything imports them
    config.pluginmanager.register(Progress(), "bench-progress")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    import machine

    start = config.stash.get(AT_START, None) or (machine.facts(), machine.limits())
    machine_info["bench"] = start[0] | {
        "limits": start[1],  # of 1 and of all threads, before the first benchmark
        "limits_end": machine.limits() if start[1] and not config.getoption("smoke") else None,
        "rounds": config.getoption("rounds"),
        "smoke": config.getoption("smoke"),
    }


# Seconds of a benchmark on a machine of two cores, from which the time of a run is estimated.
SECONDS = {
    "test_op": 1.7,
    "test_decode": 13,
    "test_prefill": 18,
    "test_batch": 20,
    "test_layer_sharing": 9,
    "test_threads": 8,
    "test_start": 10,
    "test_table_7": 100,
    "test_peers": 140,
    "test_quality": 100,
}
FEW_PEERS = 25  # of "test_peers" in a quick run, which has three engines


def expected_seconds(items) -> list[float]:
    """Estimate how long each benchmark takes; nothing for other tests."""
    quick = all(item.get_closest_marker("quick") for item in items)
    known = SECONDS | ({"test_peers": FEW_PEERS} if quick else {})
    return [0 if _of_gpu(i) else known.get(getattr(i, "originalname", ""), 0) for i in items]


class Progress:
    """Shows which benchmark runs, how many there are, the time since the start and that to go.

    A bar on a terminal, a line per benchmark elsewhere. The time to go is estimated from `SECONDS`,
    times as slow as this machine was so far.
    """

    def __init__(self):
        self.bar, self.done, self.total, self.started = None, 0, 0, 0.0
        self.expected = []

    def pytest_collection_finish(self, session):
        self.total, self.started = len(session.items), perf_counter()
        option = session.config.getoption
        if option("benchmark_only", False) and not (option("smoke") or option("collectonly")):
            self.expected = expected_seconds(session.items)
            minutes = sum(self.expected) / 60
            print(f"{self.total} tests, about {minutes:.0f} minutes", file=sys.stderr)
        if sys.stderr.isatty() and self.total and not session.config.getoption("collectonly"):
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread beside what is measured
            self.bar = tqdm(total=self.total, unit="test", dynamic_ncols=True, mininterval=0)

    def pytest_runtest_logstart(self, nodeid):
        self.done += 1
        name = nodeid.rpartition("/")[2]
        if self.bar is None:
            seconds = perf_counter() - self.started
            text = f"[{self.done}/{self.total}, {seconds:.0f} s{self._to_go(seconds)}] {name}"
            print(text, file=sys.stderr)
        else:
            self.bar.set_description(name[-60:])

    def _to_go(self, seconds: float) -> str:
        """Say how long the benchmarks that have not begun will take, if that is known."""
        so_far, left = sum(self.expected[: self.done - 1]), sum(self.expected[self.done - 1 :])
        pace = seconds / so_far if so_far > 60 else 1
        return f", about {pace * left:.0f} to go" if left else ""

    def pytest_runtest_logfinish(self):
        if self.bar is not None:
            self.bar.set_postfix_str("", refresh=False)
            self.bar.update()

    def pytest_report_teststatus(self, report):
        """Leave out the dot of a passed test: the progress tells as much."""
        return ("passed", "", "PASSED") if report.when == "call" and report.passed else None

    def pytest_sessionfinish(self):
        if self.bar is not None:
            self.bar.close()

    def detail(self, text: str) -> None:
        if self.bar is None:
            print(f"    {text}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(text[-60:])
