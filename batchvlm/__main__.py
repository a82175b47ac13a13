"""`python -m batchvlm` is the `batchvlm` command."""

import sys

from batchvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
