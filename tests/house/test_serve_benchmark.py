"""The parts of ``benchmarks/serve.py`` that need no vLLM."""

from __future__ import annotations

import importlib
import json
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from reasonalloc.errors import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Two runs of vLLM 0.32's `vllm bench serve --save-result`; what is not read is left out.
RECORDED: tuple[dict[str, Any], ...] = (
    {
        "completed": 24,
        "failed": 0,
        "output_throughput": 1243.695,
        "median_ttft_ms": 153.4515,
        "mean_ttft_ms": 2724.9767,
        "p99_ttft_ms": 7034.8799,
        "mean_tpot_ms": 10.5753,
        "p99_itl_ms": 40.2736,
        "mean_e2el_ms": 8002.0397,
    },
    {
        "completed": 24,
        "failed": 0,
        "output_throughput": 1061.0112,
        "median_ttft_ms": 272.3154,
        "mean_ttft_ms": 270.2696,
        "p99_ttft_ms": 274.6942,
        "mean_tpot_ms": 15.3728,
        "p99_itl_ms": 39.9205,
        "mean_e2el_ms": 7941.3005,
    },
)
# A server whose engine is a process of its own that does not hear SIGTERM.
SERVER = """
import http.server, os, signal, subprocess, sys
engine = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", engine])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for engine in ("0", "1"):
            line = f'vllm:num_preemptions_total{{engine="{engine}"}} {float(engine) + 3}\\n'
            self.wfile.write(line.encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(("mix", "medians"), [("sharegpt", (100, 200)), ("reasoning", (150, 2000))])
def test_lengths_are_what_the_mix_says(part: Any, mix: str, medians: tuple[int, int]) -> None:
    draw = part("serve_traffic").draw_lengths
    whole = draw(mix, 4000, 1.0, 0)
    for found, median in zip(zip(*whole, strict=True), medians, strict=True):
        assert statistics.median(found) == pytest.approx(median, rel=0.05)
        assert 4 <= min(found) < median / 3
        assert max(found) in (1024, 8192)
    assert draw(mix, 4000, 1.0, 0) == whole
    assert draw(mix, 10, 1.0, 0) == whole[:10]
    assert draw(mix, 4000, 1.0, 1) != whole
    for short, long in zip(draw(mix, 50, 0.1, 0), whole, strict=False):
        assert all(abs(s - max(4, n / 10)) <= 0.6 for s, n in zip(short, long, strict=True))


def test_the_same_requests_everywhere(part: Any) -> None:
    """Rows of two machines, or of a run that goes on, are about the same requests."""
    draw = part("serve_traffic").draw_lengths
    assert draw("sharegpt", 2, 1.0, 0) == [(9, 277), (68, 239)]
    assert draw("reasoning", 2, 0.25, 1) == [(29, 816), (54, 422)]


def test_prompts_have_exactly_these_tokens(part: Any, folder: Path, tmp_path: Path) -> None:
    traffic = part("serve_traffic")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = traffic.find_words(tokenizer)
    assert len(words) > 20
    lengths = traffic.draw_lengths("sharegpt", 8, 0.25, 0)
    path = tmp_path / "sharegpt.jsonl"
    traffic.write_dataset(path, lengths, words, 0)
    first = path.read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    prompts = [tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in rows]
    assert [(len(p), r["output_tokens"]) for p, r in zip(prompts, rows, strict=True)] == lengths
    traffic.write_dataset(path, lengths, words, 1)
    assert path.read_text() != first, "a prompt of an earlier run is in the prefix cache"
    traffic.write_dataset(path, lengths, words, 0)
    assert path.read_text() == first


def test_recorded_results_become_cells(part: Any) -> None:
    cells = part("serve_table").summarise(RECORDED)
    # Student's t with one degree of freedom is 12.706, times half of the distance of two runs.
    assert cells["tok/s"] == f"1152 ± {12.706 * 91.3419:.0f}"
    assert cells["TPOT mean, ms"] == f"13.0 ± {12.706 * 2.3987:.1f}"
    assert cells["E2E mean, s"] == f"7.97 ± {12.706 * 0.0304:.2f}"
    assert cells["tok/s / full"] == ""
    twice = tuple({**run, "output_throughput": run["output_throughput"] * 2} for run in RECORDED)
    assert part("serve_table").summarise(twice, RECORDED)["tok/s / full"] == "2.00 ± 0.00"
    halves = part("serve_table").summarise((twice[0], RECORDED[1]), RECORDED)
    assert halves["tok/s / full"] == f"1.50 ± {12.706 / 2:.2f}"


def cells(part: Any, *arguments: str) -> list[dict[str, str]]:
    """What rows of a command line say, without those that need vLLM."""
    serve = part("serve")
    options = serve.parse(arguments)
    return [serve.settings(options, case, 1024) for case in serve.list_cases(options)]


def test_a_row_is_measured_once(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part("serve"), "versions", lambda: "vllm 0.32.0")
    table = part("serve_table").Table(tmp_path / "rows.md")
    every = ("--arms", "full,rkv(lam=0.2)/uniform/adakv", "--budgets", "96,128", "--runs", "2")
    rows = cells(part, *every)
    assert len(rows) == (1 + 2) * 2 * 2  # arms and budgets, pools, mixes
    measured = {**part("serve_table").summarise(RECORDED), "engine steps": "9", "preemptions": "3"}
    for row in rows[:5]:
        table.append(row, measured)
    assert [table.has(row) for row in rows] == [True] * 5 + [False] * (len(rows) - 5)
    assert table.rows()[1]["mix"] == "reasoning"
    assert table.rows()[1]["preemptions"] == "3"
    for other in (["--requests", "5"], ["--scale", "0.5"], ["--no-enforce-eager"], ["--turns"]):
        assert not table.has(cells(part, *every, *other)[0]), other
    assert table.has(cells(part, *every, "--port", "9000")[0])
    monkeypatch.setattr(part("serve"), "versions", lambda: "vllm 0.33.0")
    assert not table.has(cells(part, *every)[0])


def test_arms_take_turns(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, seen = part("serve"), []

    def bench(line: list[str], result: Path) -> dict[str, Any]:
        requests, url = line[line.index("--num-prompts") + 1], line[line.index("--base-url") + 1]
        seen.append((url, int(requests), Path(line[line.index("--dataset-path") + 1]).read_text()))
        speed = {"http://full": 1000.0, "http://rkv": 1500.0}[url]
        return {**RECORDED[0], "output_throughput": speed}

    monkeypatch.setattr(serve, "bench", bench)
    monkeypatch.setattr(serve, "counts", lambda url, names: [3.0 * len(seen), float(len(seen))])
    options = serve.parse(["--mixes", "sharegpt", "--kv-memory", "6MiB", "--turns", "--runs", "3"])
    cases = serve.list_cases(options)
    urls = {case.server: f"http://{case.arm}" for case in cases}
    rows = serve.run_cases(options, cases, urls, "MODEL", ["a", "b"], tmp_path)
    arms = [url.removeprefix("http://") for url, *_ in seen]
    assert arms == ["full", "rkv", "full", "rkv", "rkv", "full", "full", "rkv"]
    assert [requests for _, requests, _ in seen] == [2] * 2 + [96] * 6
    prompts = [text for *_, text in seen]
    assert [prompts.index(text) for text in prompts] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [row["tok/s / full"] for row in rows] == ["", "1.50 ± 0.00"]
    # The warm-up's are not counted.
    assert [(row["engine steps"], row["preemptions"]) for row in rows] == [("18", "6")] * 2


def test_another_file_is_not_written_to(part: Any, tmp_path: Path) -> None:
    other = tmp_path / "notes.md"
    other.write_text("| a | b |\n|---|---|\n")
    with pytest.raises(UsageError, match=r"notes\.md holds no table"):
        part("serve_table").Table(other).rows()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arms", "rvk"], "unknown arm 'rvk'"),
        (["--arms", "rkv/uniform/nothing"], "nothing"),
        (["--budgets", "0"], "budget"),
        (["--interval", "0"], "interval=0"),
        (["--mixes", "sharegtp"], "unknown mix 'sharegtp'"),
        (["--kv-memory", "6 apples"], "--kv-memory='6 apples'"),
        (["--kv-memory", ","], "--kv-memory=',' is empty"),
        (["--runs", "1"], "--runs=1 is too small"),
        (["--scale", "nan"], "--scale=nan"),
        (["--request-rates", "inf,fast"], "'fast' is no rate"),
        ([], "the benchmark needs the package 'vllm'"),
    ],
)
def test_refused_with_one_line(
    part: Any,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part("serve").importlib.util, "find_spec", lambda name: None)
    assert part("serve").main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_a_port_in_use_is_not_taken(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert part("serve_server").free_port(port) not in (0, port)
    assert f"port {port} is in use" in capsys.readouterr().err
    assert part("serve_server").free_port(port) == port


def alive(process: int) -> bool:
    """Whether it runs: one that ended and that nobody asked for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_nothing_is_left_of_a_server(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, pids = part("serve_server"), tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    line = [sys.executable, "-c", SERVER]
    started: list[int] = []

    def broken_off() -> None:
        with module.serving(line, tmp_path / "log", port=0, patience=60, offline=True) as url:
            started.extend(int(text) for text in pids.read_text().split())
            assert all(alive(process) for process in started)
            assert module.counts(url, ["vllm:num_preemptions_total", "vllm:none"]) == [7, 0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert len(started) == 2
    limit = time.monotonic() + 10
    while any(alive(process) for process in started) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(alive(process) for process in started)


@pytest.mark.parametrize(("code", "name"), [(2, "UsageError"), (1, "Failed")])
def test_a_server_that_does_not_start(part: Any, tmp_path: Path, code: int, name: str) -> None:
    module = part("serve_server")
    text = f"print('loading'); print('error: no such model'); raise SystemExit({code})"
    line = [sys.executable, "-c", text]
    with (
        pytest.raises(Exception, match=rf"the server ended \({code}\): no such model$") as raised,
        module.serving(line, tmp_path / "log", port=0, patience=60, offline=True),
    ):
        pass
    assert type(raised.value).__name__ == name


def test_a_server_that_never_answers(part: Any, tmp_path: Path) -> None:
    module = part("serve_server")
    pid = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    line = [sys.executable, "-c", f"import os, time; {pid}; time.sleep(600)"]
    with (
        pytest.raises(module.Failed, match="patience=2 seconds"),
        module.serving(line, tmp_path / "log", port=0, patience=2, offline=True),
    ):
        pass
    assert not alive(int((tmp_path / "pid").read_text()))
