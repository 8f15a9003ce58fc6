"""How long tests wait for a process: longer than any takes on a busy machine, unless it hangs."""

from __future__ import annotations

#: Seconds.
PATIENCE = 1800
