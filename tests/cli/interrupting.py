"""A calibration that is interrupted while it measures."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from patience import PATIENCE


def interrupt_calibration(*arguments: object) -> None:
    """Start ``calibrate``, press Ctrl-C once it runs, and look at how it ends."""
    run = "import sys; from reasonalloc.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", run, "calibrate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "will run" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    *progress, last = err.strip().splitlines()
    assert process.returncode == 130 and last == "error: interrupted"
    assert all(line.startswith("note: Calibrating: ") for line in progress)
