"""vLLM's OpenAI-compatible server, with refusals as one line: what ``reasonalloc serve`` becomes.

``python -m reasonalloc.integrations.vllm.server`` takes the arguments of vLLM's own server.
"""

from __future__ import annotations

import runpy
import sys

from reasonalloc.errors import UnsupportedError, UsageError

_SERVER = "vllm.entrypoints.openai.api_server"


def main() -> int:
    """Serve until the process is asked to stop; returns the exit code (2: refused)."""
    try:
        # In place of this module: processes that vLLM spawns import vLLM's again.
        runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)
    except (UsageError, UnsupportedError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
