"""All that a GPU has to show, in parts of under eight minutes; started again, it goes on.

    make gpu-check
    make gpu-check GPU_CHECK="--only kernel,paged --minutes 9"

Nothing is installed or fetched: Python needs torch, triton, transformers, safetensors, pytest,
hypothesis, typer and rich, and vLLM for the parts that serve. Without vLLM those parts are named
as not measured. Every part that ends adds a row to benchmarks/results/gpu-check.jsonl, and
gpu-check.md beside it shows the newest row of each. A part that has passed with the same sources,
GPU and versions is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
LIMIT = 480  # seconds of a part
NEEDS = ("torch", "triton", "transformers", "safetensors", "pytest", "hypothesis", "typer", "rich")


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: for ``--only`` and the table.
        command: after the interpreter; ``OUT`` is a file for what it found, as JSON.
        minutes: what it takes, roughly.
        vllm: whether it needs vLLM.
        least: figures that must be at least so large to pass.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    vllm: bool = False
    least: dict[str, float] = field(default_factory=dict)


def tests(*paths: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths)


def bench(*options: str) -> tuple[str, ...]:
    shared = "--shape llama-8b --device cuda --budget 1024 --interval 128 --attention triton"
    return (
        "-m",
        "reasonalloc",
        "bench",
        *shared.split(),
        "--step",
        "graph",
        *options,
        "--out",
        "OUT",
    )


def engine(*options: str) -> tuple[str, ...]:
    return ("benchmarks/gpu_engine.py", *options, "--out", "OUT")


def parts() -> list[Part]:
    """All of them, in the order in which they run."""
    copy = {"share_of_copy": 0.8}
    found = [
        Part("cuda", tests("tests/core/test_cuda.py"), 5),
        Part("triton", tests("tests/core/test_triton.py", "-m", "not long"), 6),
        Part("kernel", ("benchmarks/kernel_bandwidth.py", "--out", "OUT"), 2, least=copy),
        Part("paged", ("benchmarks/paged_bandwidth.py", "--out", "OUT"), 2, least=copy),
        Part(
            "paged-fp8", ("benchmarks/paged_bandwidth.py", "--fp8", "--out", "OUT"), 2, least=copy
        ),
        Part(
            "paged-bits",
            ("benchmarks/paged_bandwidth.py", "--kv-dtype", "int8:int4", "--out", "OUT"),
            2,
        ),
        Part(
            "decode-1",
            bench(
                *("--batch", "1", "--new-tokens", "2048", "--at", "512"),
                *("--arms", "rkv,rkv/uniform/reasonalloc,full,full-static"),
            ),
            4,
        ),
        Part(
            "decode-256",
            bench("--batch", "256", "--new-tokens", "4096", "--at", "1024", "--arms", "rkv"),
            5,
        ),
        Part(
            "decode-256-heads",
            bench(
                *("--batch", "256", "--new-tokens", "4096", "--at", "1024"),
                *("--arms", "rkv/uniform/reasonalloc"),
            ),
            5,
        ),
        Part(
            "decode-24-full",
            bench("--batch", "24", "--new-tokens", "4096", "--at", "1024", "--arms", "full"),
            4,
        ),
    ]
    for name in ("tokens", "bits", "blocks", "prefixes", "async", "pausing", "runners"):
        paths = tests(f"tests/serving/test_{name}.py")
        found.append(Part(f"vllm-{name}", paths, 6, vllm=True))
    found += [
        Part("vllm-bfloat16", engine("near-ties"), 3, vllm=True),
        Part("vllm-graphs", engine("graphs"), 4, vllm=True),
        Part("vllm-memory", engine("plateau"), 4, vllm=True),
    ]
    for mix in ("short", "long", "mixed"):
        for share in ("1", "0.25"):
            for budget in ("0", "1024", "2048", "16384"):
                name = f"serve-{mix}-{share}-{budget if budget != '0' else 'stock'}"
                options = ("throughput", "--mix", mix, "--share", share, "--budget", budget)
                found.append(Part(name, engine(*options), 6, vllm=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of parts, or their beginnings, separated by commas")
    parser.add_argument("--minutes", type=float, help="start nothing that would not end by then")
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument("--list", action="store_true", help="name the parts, and run none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and table")
    options = parser.parse_args()
    chosen = choose(parser, options.only)
    if options.list:
        for part in chosen:
            print(f"{part.name}: {part.minutes:g} minutes{', needs vLLM' if part.vllm else ''}")
        return
    if lacking := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        parser.error(f"this Python lacks {', '.join(lacking)}: give another one, make PYTHON=...")
    import torch

    if not torch.cuda.is_available():
        parser.error("gpu-check measures a GPU, and torch sees none here")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "gpu-check.jsonl", machine())
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    has_vllm = importlib.util.find_spec("vllm") is not None
    left = []
    for part in chosen:
        if (part.vllm and not has_vllm) or (rows.passed(part) and not options.again):
            continue
        if time.monotonic() + 60 * part.minutes > until:
            left.append(part.name)
            continue
        print(f"{part.name} ...", flush=True)
        row = run(part, min(LIMIT, until - time.monotonic()))
        rows.add(part, row)
        print(f"{part.name}: {row['status']} after {row['seconds']:.0f} s", flush=True)
    text = table(chosen, rows, has_vllm)
    (options.out / "gpu-check.md").write_text(text, encoding="utf-8")
    print(text)
    if left:
        print(f"No time was left for {', '.join(left)}: start the command again.")
    if any(rows.of(part).get("status") in ("failed", "timed out") for part in chosen):
        raise SystemExit(1)


def choose(parser: argparse.ArgumentParser, only: str | None) -> list[Part]:
    """The parts that are asked for, in their order."""
    everything = parts()
    if only is None:
        return everything
    starts = [start.strip() for start in only.split(",")]
    for start in starts:
        if not any(part.name.startswith(start) for part in everything):
            parser.error(f"--only {start} begins the name of no part: see --list")
    return [part for part in everything if part.name.startswith(tuple(starts))]


class Rows:
    """Rows in a file: what ran, where, and what came of it; the newest of a part counts."""

    def __init__(self, path: Path, where: dict[str, str]) -> None:
        self._path, self._where = path, where
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]

    def of(self, part: Part) -> dict[str, Any]:
        """The newest row of a part on this machine, of these sources; empty where none is."""
        for row in reversed(self._rows):
            same = all(row.get(key) == value for key, value in self._where.items())
            if same and row["part"] == part.name and row["command"] == list(part.command):
                return row
        return {}

    def passed(self, part: Part) -> bool:
        return bool(self.of(part).get("status") == "passed")

    def add(self, part: Part, row: dict[str, Any]) -> None:
        """Append it to the file, whole or not at all."""
        known = {"part": part.name, "command": list(part.command)}
        self._rows.append({**known, **row, **self._where})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._rows[-1]) + "\n")

    @property
    def where(self) -> dict[str, str]:
        return self._where


def machine() -> dict[str, str]:
    """GPU, versions, and the sources that run."""
    import torch

    versions = {}
    for name in ("triton", "transformers", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "sources": sources(),
    }


@functools.cache
def sources() -> str:
    """A digest of what is measured: the package, the tests, and the scripts here."""
    digest = hashlib.sha256()
    for folder in ("src/reasonalloc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".json") and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part in a process group of its own; what came of it."""
    with tempfile.TemporaryDirectory() as folder, plugin(Path(folder)) as path:
        out = Path(folder) / "out.json"
        command = [str(out) if word == "OUT" else word for word in part.command]
        start = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=seconds)
            status = "passed" if child.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            stop(child)
            output, status = child.communicate()[0], "timed out"
        except BaseException:
            stop(child)
            raise
        row = {"status": status, "seconds": time.monotonic() - start, "figures": {}}
        if out.exists():
            row["figures"] = figures(json.loads(out.read_text(encoding="utf-8")))
        low = short_of(part.least, row["figures"])
        if status == "passed" and low:
            row["status"], row["reason"] = "failed", "; ".join(low)
        elif status != "passed":
            row["reason"] = "\n".join(output.splitlines()[-12:])
            print(output[-4000:], flush=True)
        return row


def short_of(least: dict[str, float], found: dict[str, Any]) -> list[str]:
    """Which figures are below what they should be."""
    values = {name: found.get(name, 0.0) for name in least}
    return [f"{k} {values[k]:.2f} < {v}" for k, v in least.items() if values[k] < v]


def stop(child: subprocess.Popen[str]) -> None:
    """End a part and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def environment(plugins: Path) -> dict[str, str]:
    folders = [str(plugins), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folder for folder in folders if folder)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@contextlib.contextmanager
def plugin(folder: Path) -> Iterator[Path]:
    """A folder from which vLLM learns of the plugin where the package is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("reasonalloc")
        yield folder
        return
    info = folder / "reasonalloc-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasonalloc\nVersion: 0\n")
    lines, inside = [], False
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            inside = line.startswith("[project.entry-points.")
            if inside:
                lines.append("[" + line.split(".", 2)[2].strip('"]') + "]")
        elif inside and line.strip():
            lines.append(line.replace('"', ""))
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    yield folder


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of a part that its row keeps."""
    if "copy_bytes_per_second" in found:  # a kernel: where the GPU has enough to do
        wide = [row for row in found["rows"] if row.get("batch", row.get("requests", 0)) >= 32]
        shares = [row["share_of_copy"] for row in wide if row.get("budget", 1024) >= 512]
        return {
            "share_of_copy": statistics.median(shares),
            "lowest_share": min(shares),
            "copy_gb_per_second": found["copy_bytes_per_second"] / 1e9,
            "cases": len(shares),
        }
    if "summary" in found:  # reasonalloc bench
        return {
            f"{arm['arm']} {key}": arm[key]
            for batch in found["summary"]
            for arm in batch["arms"]
            for key in ("tokens_per_second", "kv_bytes", "peak_bytes")
            if arm[key] is not None
        }
    return found


def table(chosen: Sequence[Part], rows: Rows, has_vllm: bool) -> str:
    """Markdown: a row per part, whichever way it fell."""
    where = ", ".join(f"{key} {value}" for key, value in rows.where.items())
    lines = ["# GPU", "", f"`make gpu-check`: {where}.", "", "| part | result | seconds | found |"]
    lines.append("|---|---|---|---|")
    for part in chosen:
        row = rows.of(part)
        status = row.get("status", "not measured")
        why = (
            "" if row else "vLLM is not installed" if part.vllm and not has_vllm else "did not run"
        )
        found = row.get("reason", "").splitlines()[-1:] or [show(row.get("figures", {}))]
        seconds = f"{row['seconds']:.0f}" if row else ""
        lines.append(f"| {part.name} | {status} | {seconds} | {why or found[0]} |")
    return "\n".join(lines) + "\n"


def show(numbers: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in numbers.items()
    ).replace("|", "/")


if __name__ == "__main__":
    main()
