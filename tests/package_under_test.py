"""Finds the one package that every way of running pytest tests: the installed one, else a tree."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prefer_installed() -> None:
    """Take the installed package, else a tree built in place.

    `python -m pytest` puts the root first on the path, where the package may have no extension.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if importlib.util.find_spec("mobilellm_fast") is None:
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
