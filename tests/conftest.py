"""What every test needs."""

from __future__ import annotations

import signal

# A shell that starts pytest in the background has it, and all it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
