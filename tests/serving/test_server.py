"""The OpenAI-compatible server that ``reasonalloc serve`` starts, through real HTTP."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import random_prompts

from patience import PATIENCE
from reasonalloc.cli import serve
from reasonalloc.cli.main import main
from reasonalloc.tables import human

SETTINGS = {"budget": 64, "interval": 32, "arm": "rkv/uniform/reasonalloc"}
LAYERS, KV_HEADS = 4, 2
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "reasonalloc.json"


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        found = re.findall(r"^reasonalloc:(\w+)\{.*\} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in found if not name.endswith("_created")}

    def metrics_when(self, wanted: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Metrics as soon as they are so; the last ones if they never are."""
        limit = time.monotonic() + PATIENCE
        while not wanted(found := self.metrics()) and time.monotonic() < limit:
            time.sleep(0.1)
        return found


def command(folder: Path, *more: str) -> list[str]:
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return [sys.executable, "-m", "reasonalloc", "serve", str(folder), *options, *more]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    sizes = ["--port", str(port), "--max-model-len", "1024", "--kv-memory", "16MiB"]
    line = command(folder, *sizes, "--enforce-eager")  # the last one is vLLM's own
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=environment)
    running = Server(f"http://127.0.0.1:{port}", process, folder, log)
    try:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                running.get("/health")
                break
            except OSError:
                time.sleep(0.5)
        yield running
    finally:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def ids(server: Server, client: Any, prompt: list[int], new: int, **more: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model=str(server.folder),
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        extra_body=extra,
        **more,
    )


def test_tokens_are_those_of_transformers(
    server: Server, client: Any, clear: Callable[..., Any]
) -> None:
    for prompt, expected in zip(*clear((40, 150), 200, **SETTINGS), strict=True):
        answer = ids(server, client, prompt, 200)
        assert answer.choices[0].token_ids == expected
        assert answer.usage.completion_tokens == 200
        streamed: list[int] = []
        for part in ids(server, client, prompt, 200, stream=True):
            streamed += part.choices[0].token_ids or []
        assert streamed == expected


def test_metrics_count_what_happened(server: Server, client: Any) -> None:
    before = server.metrics_when(lambda found: found["kv_bytes_in_use"] == 0)
    ids(server, client, random_prompts([40])[0], 200)
    after = server.metrics_when(
        lambda found: (
            found["kv_tokens_kept_total"] > before["kv_tokens_kept_total"]
            and found["kv_bytes_in_use"] == 0
        )
    )
    grown = {name: after[name] - before[name] for name in after}
    # 239 tokens were fed; boundaries at 72 (the first above 64), 104, 136, 168, 200, 232.
    assert grown["compressions_total"] == 6
    assert grown["kv_tokens_kept_total"] == LAYERS * KV_HEADS * (64 + 239 - 232)
    assert grown["kv_tokens_evicted_total"] == LAYERS * KV_HEADS * (239 - 64 - 7)
    block = 2 * LAYERS * KV_HEADS * 32 * 32 * 4  # keys and values, 32 tokens of 32 float32 numbers
    assert after["kv_bytes_per_sequence"] == 4 * block
    assert grown["kv_bytes_saved_total"] == (8 - 4) * block  # ceil(239 / 32) = 8
    assert after["kv_bytes_in_use"] == 0


def test_the_server_exports_what_the_dashboard_asks_for(server: Server) -> None:
    page = json.loads(DASHBOARD.read_text("utf-8"))
    queries = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
    queries += [variable["definition"] for variable in page["templating"]["list"]]
    wanted = {name for query in queries for name in re.findall(r"(?:vllm|reasonalloc):\w+", query)}
    assert {name.partition(":")[0] for name in wanted} == {"vllm", "reasonalloc"}
    exported: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([\w:]+)\{(.*)\} \S+$", server.get("/metrics"), re.MULTILINE):
        exported.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    assert wanted - exported.keys() == set()
    for name in wanted:
        needed = {"model_name", "engine"} | ({"le"} if name.endswith("_bucket") else set())
        assert needed <= exported[name], name


def test_a_client_that_disconnects_leaves_no_blocks(server: Server, client: Any) -> None:
    stream = ids(server, client, random_prompts([60])[0], 900, stream=True)
    next(iter(stream))
    assert server.metrics_when(lambda m: m["kv_bytes_in_use"] > 0)["kv_bytes_in_use"] > 0
    stream.close()
    assert server.metrics_when(lambda m: m["kv_bytes_in_use"] == 0)["kv_bytes_in_use"] == 0
    running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", server.get("/metrics"), re.M)
    assert running is not None
    assert float(running.group(1)) == 0


def test_ctrl_c_stops_it(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) in (0, 130)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--prompt", "protect"], "prompt='protect'"),
        (["--kv-dtype", "int8", "--prompt", "protect"], "prompt='protect'"),
        (["--arm", "tri_attention/uniform/uniform"], "tri_attention"),
        (["--arm", "best"], "needs a cost profile"),
        (["--additional-config", "{}"], "--budget"),
        (["--additional_config.reasonalloc", "1"], "--additional-config.reasonalloc is made of"),
        (["--tensor-parallel-size", "4"], "divides them"),
    ],
)
def test_refused_before_the_server_starts(
    folder: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, *more)[3:]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert says in line


def test_refused_by_the_server_with_one_line(folder: Path) -> None:
    asked = command(folder, "--arm", "h2o", "--enable-prefix-caching")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert "leave the flag out" in line
    assert "Traceback" not in done.stderr


FILE = """
port: 9000
max_model_len: 300
kv-cache-dtype: fp8
enforce-eager: true
enable-prefix-caching: false
speculative-config: {model: small}
"""


def test_what_the_server_process_gets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever vLLM makes of further options and of the environment, the budget is this one."""
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        os, "execve", lambda _, line, environment: started.append((line, environment))
    )
    monkeypatch.setenv("REASONALLOC_VLLM", '{"budget": 999}')
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    more = ["--kv-memory", "16MiB", "--block_size", "64", "--additional-conf", "{}"]
    assert main(command(folder, *more)[3:]) == 0
    ((line, environment),) = started
    assert ("--block-size", "64") in [*itertools.pairwise(line)] and "--block_size" not in line
    settings = json.loads(line[line.index("--additional-config") + 1])["reasonalloc"]
    assert json.loads(environment["REASONALLOC_VLLM"]) == settings
    assert environment["VLLM_PLUGINS"] == "other,reasonalloc"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment  # the size is on the command line
    assert main([*command(folder)[3:], "--arm", "full"]) == 2  # which has no budget
    assert main(["serve", str(folder), "--arm", "full"]) == 0
    environment = started[-1][1]
    assert "REASONALLOC_VLLM" not in environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_a_file_of_options(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server gets what it says, and so does the table; the command line has the last word."""
    started: list[str] = []
    monkeypatch.setattr(serve, "_become_server", started.extend)
    path = tmp_path / "options.yaml"
    path.write_text(FILE)
    assert main(command(folder, "--config", str(path), "--max-model-len", "200")[3:]) == 0
    pairs = list(itertools.pairwise(started))
    assert {("--port", "9000"), ("--max-model-len", "200"), ("--config", str(path))} <= {*pairs}
    shown = capsys.readouterr().err
    assert "200 tokens" in shown
    block = 2 * LAYERS * KV_HEADS * 32 * 32  # one byte for each number
    assert f"7 blocks, {human(7 * block)}" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budget: 9", "--budget is no option of vLLM's"),
        ("additional-config: {reasonalloc: {budget: 9}}", "--additional-config is made of"),
        ("model: other", "other"),
        ("port: many", "--port"),
        ("- port", "no table"),
        ("a: [", "--config"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_refused(
    folder: Path,
    tmp_path: Path,
    text: str | None,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    assert main(command(folder, "--config", str(path))[3:]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert says in line


def test_the_entry_point_is_declared() -> None:
    names = [e.name for e in importlib.metadata.entry_points(group="vllm.stat_logger_plugins")]
    assert "reasonalloc" in names
