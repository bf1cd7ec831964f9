"""Where this package keeps files on the user's machine."""

import errno
import os
from pathlib import Path


def cache_directory() -> Path:
    """Where downloads are kept: MOBILELLM_FAST_CACHE, else the user's cache directory.

    Raises:
        OSError: the user has no home, as in a container that runs as somebody it does not know.
    """
    if chosen := os.environ.get("MOBILELLM_FAST_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "mobilellm_fast")
    try:
        return Path.home() / ".cache" / "mobilellm_fast"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "No home directory", "~") from error
