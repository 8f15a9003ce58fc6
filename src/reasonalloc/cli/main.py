"""Entry point: turns every mistake into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

from reasonalloc.errors import OtherCadence, UnsupportedError, UsageError

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (1: no memory, 2: wrong use, 130: Ctrl-C)."""
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError:
        print(
            "error: the command line needs typer and rich: pip install 'reasonalloc[cli]'",
            file=sys.stderr,
        )
        return USAGE
    # OpenMP's threads spin while they wait. On a machine that does anything else besides, decoding
    # with spinning threads measured 8 to 18 times slower. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    said: set[str] = set()
    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, OtherCadence):
            show(message, category, *rest, **more)
        elif str(message) not in said:
            said.add(str(message))
            print(f"note: {message}", file=sys.stderr)

    try:
        warnings.showwarning = say
        from reasonalloc.cli.app import app

        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="reasonalloc",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except (UsageError, UnsupportedError) as error:
        return _fail(str(error), USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _hush()
    except SystemExit as error:  # rich and typer leave this way when a pipe is closed
        return _hush() if error.code == 1 else int(error.code or 0)
    except Exception as error:
        # Click's errors: typer brings its own copy of click or uses the installed one.
        if not any(c.__name__ == "ClickException" for c in type(error).__mro__):
            if (message := _no_memory(error)) is None:
                raise
            return _fail(message, FAILED)
        failure: Any = error
        if not failure.format_message():  # no command: the help was printed
            return USAGE
        return _fail(_explain(failure, sys.argv[1:] if arguments is None else arguments), USAGE)
    finally:
        warnings.showwarning = show
    return code if isinstance(code, int) else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. PyTorch aborts the process if its import is broken off: leave in our own way."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        os.write(2, b"error: interrupted\n")
        os._exit(INTERRUPTED)
    signal.default_int_handler(number, frame)


def _no_memory(error: Exception) -> str | None:
    """What to say if memory did not suffice; None: it was something else."""
    if "torch" not in sys.modules:
        return None
    from reasonalloc.evaluation.batch import is_memory

    if not is_memory(error):
        return None
    said = " ".join(str(error).split()).partition(" If reserved")[0]
    return f"memory does not suffice ({said[:200]}): give a smaller budget, batch, text or model"


def _explain(error: Any, arguments: Sequence[str]) -> str:
    """The parser's message, with the value that it leaves out."""
    message = error.format_message().rstrip(".")
    for name in getattr(getattr(error, "param", None), "opts", ()):
        for index, argument in enumerate(arguments):
            value = argument.partition("=")[2]
            if argument == name and index + 1 < len(arguments):
                value = arguments[index + 1]
            if argument.partition("=")[0] == name and value and value not in message:
                return f"{message}, not {value!r} (see --help)"
    return f"{message} (see --help)"


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _hush() -> int:
    """Whoever read our output is gone: leave without a message at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return BROKEN_PIPE
