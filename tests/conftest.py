"""Every way of running pytest tests one package: the installed one, else a tree built in place."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the root first on the path, where the package may have no extension.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if importlib.util.find_spec("mobilellm_fast") is None:
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Run in another directory, since `python -c` looks for packages in the working directory."""
    home = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(home)
