"""A command of reasonalloc that counts CPU time instead of time: for a machine that others use too.

OMP_NUM_THREADS=1 python benchmarks/cpu_time.py bench --shape smollm2-135m --device cpu ...
"""

from __future__ import annotations

import sys
import time

time.perf_counter = time.process_time

from reasonalloc.cli.main import main  # noqa: E402  (after the clock is set)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
