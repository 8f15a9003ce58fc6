"""``python -m reasonalloc``, and ``torchrun -m reasonalloc`` for sharded models."""

import sys

from reasonalloc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
