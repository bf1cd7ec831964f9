"""Where this package keeps files on the user's machine."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where downloads are kept: MOBILELLM_FAST_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("MOBILELLM_FAST_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mobilellm_fast"
