"""Every way of running pytest tests one package: the installed one, else a tree built in place."""

import os
from pathlib import Path

import package_under_test
import pytest

package_under_test.prefer_installed()


def pytest_pycollect_makemodule(module_path, parent):
    """Interpret kernels from before the first module about GPUs is imported, if any is."""
    if "gpu" in module_path.name or "cuda" in module_path.name:
        from interpreted import interpret_kernels

        interpret_kernels()


def pytest_addoption(parser):
    parser.addoption(
        "--all-builds",
        action="store_true",
        help="compile every build of the Triton kernels, not only the quick ones",
    )
    parser.addoption("--failures", help="file that names each failing test as soon as it fails")


def pytest_configure(config):
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):  # of xdist's processes, the one that reports
        config.pluginmanager.register(Failures(Path(path).absolute()))


class Failures:
    """Writes failures down at once: a run that is ended from outside has no summary."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr if crash is None else crash)
            with self.path.open("a") as file:
                file.write(f"{report.when} {report.nodeid}: {' '.join(text.split())[:600]}\n")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Run in another directory, since `python -c` looks for packages in the working directory."""
    home = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(home)


@pytest.fixture(scope="session")
def ops_on_gpu():
    """The module `ops` with Triton kernels, and what it appends to the names of its operators.

    Without a GPU the ops are registered once more, under other names, with the CPU in its part.
    """
    from interpreted import ops_with_kernels

    return ops_with_kernels()


@pytest.fixture(scope="session")
def default_model_by_transformers():
    """Read the file of the default model, see `gguf_by_transformers`, which takes it seconds."""
    from gguf_by_transformers import read_by_transformers

    from mobilellm_fast.checkpoint.default_model import default_model

    return read_by_transformers(default_model())


@pytest.fixture
def poisoned():
    """Fresh tensors are full of NaN, or of the largest integer, so that what is left is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
