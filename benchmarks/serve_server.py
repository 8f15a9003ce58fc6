"""A server that ``benchmarks/serve.py`` starts, waits for and stops, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from reasonalloc.errors import UsageError

HOST = "127.0.0.1"


class Failed(Exception):
    """A server or a run that did not work."""


@contextlib.contextmanager
def serving(
    line: list[str], log: Path, *, port: int, patience: float, offline: bool
) -> Iterator[str]:
    """A server that answers, for as long as the block runs; its address."""
    port = free_port(port)
    environment = dict(os.environ)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*line, "--host", HOST, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the server
        )
    try:
        url = f"http://{HOST}:{port}"
        wait_for(process, url, patience, log)
        yield url
    finally:
        stop(process)


def free_port(wanted: int) -> int:
    """The port that is wanted, or a free one if it is in use (or 0)."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, wanted))
        except OverflowError:
            raise UsageError(f"--port={wanted} is none: give one up to 65535, or 0") from None
        except OSError:
            print(f"port {wanted} is in use: another one is taken", file=sys.stderr)
            return free_port(0)
        port: int = found.getsockname()[1]
    return port


def wait_for(process: subprocess.Popen[bytes], url: str, patience: float, log: Path) -> None:
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        code = process.poll()
        if code is not None:
            text = last_error(log.read_text("utf-8", "replace"))
            raise (UsageError if code == 2 else Failed)(f"the server ended ({code}): {text}")
        try:
            get(url + "/health")
            return
        except OSError:
            time.sleep(0.5)
    raise Failed(f"the server did not answer within --patience={patience} seconds: give it more")


def last_error(log: str) -> str:
    """The line of a log that says what was wrong."""
    lines = [line.strip() for line in log.splitlines()]
    told = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.search(r"\b\w+Error: ", line)]
    return next(iter([*told, *raised, *reversed(lines), ""])).removeprefix("error: ")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process of its group; another Ctrl-C meanwhile is not heard."""
    ignored = [
        (name, signal.signal(name, signal.SIG_IGN)) for name in (signal.SIGINT, signal.SIGTERM)
    ]
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # an engine that outlived its server
        process.wait()
    finally:
        for name, handler in ignored:
            signal.signal(name, handler)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def counts(url: str, names: Iterable[str]) -> list[float]:
    """Metrics of the server, all its engines together."""
    try:
        text = get(url + "/metrics")
    except OSError as error:
        raise Failed(f"the server does not answer any more: {error}") from None
    lines = [re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in names]
    return [sum(float(value) for value in found) for found in lines]
