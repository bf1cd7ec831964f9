"""`python -m mobilellm_fast` is `mobilellm-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
