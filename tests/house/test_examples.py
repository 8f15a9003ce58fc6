"""Every example runs on a tiny model, offline."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import reasonalloc
from patience import PATIENCE
from reasonalloc.policies import POLICIES
from tiny_folder import save_tiny

_EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., str]
api = pytest.mark.skipif(
    not hasattr(reasonalloc, "evaluate"), reason="needs plan, calibrate, fidelity and evaluate"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return save_tiny(tmp_path_factory.mktemp("chatty"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a script in an empty folder; what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(POLICIES, "_entries", POLICIES.entries())
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(_EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_attach_and_chat(run: Run, chatty: Path) -> None:
    sizes = ("--budget", 16, "--max-new-tokens", 20)
    out = run("attach_and_chat.py", "w1 w2 w3", "w4 w5", "--model", chatty, *sizes)
    read = [int(n) for n in re.findall(r"\[(\d+) tokens read, \d+ compressions\]", out)]
    assert len(read) == 2 and all(read)


def test_attach_and_chat_with_typed_questions(
    run: Run, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["w1 w2", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    out = run("attach_and_chat.py", "--model", chatty, "--budget", 12, "--max-new-tokens", 20)
    assert out.count("tokens read") == 1


def test_own_policy(run: Run, chatty: Path) -> None:
    prompt = " ".join(f"w{i}" for i in range(30))
    sizes = ("--budget", 12, "--max-new-tokens", 20, "--prompt", prompt)
    out = run("own_policy.py", "--model", chatty, *sizes)
    (first, one), (second, two) = re.findall(r"^--- (\S+): (\d+) compressions", out, re.MULTILINE)
    assert first == "rkv/uniform/uniform"
    assert second == "loud_attention(power=0.5)/uniform/uniform"
    assert int(one) > 0 and int(two) > 0


class Stub(BaseHTTPRequestHandler):
    """Answers as vLLM's server does."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply('{"object": "list", "data": [{"id": "tiny", "object": "model"}]}')
        else:
            self.reply("vllm:a 1\nreasonalloc:compressions_total 6.0\n", "text/plain")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = [asked["model"], *(message["content"] for message in asked["messages"])]
        parts = [{"index": 0, "delta": {"content": f"{word} "}} for word in words]
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
        lines = [f"data: {json.dumps({**chunk, 'choices': [part]})}\n\n" for part in parts]
        self.reply("".join(lines) + "data: [DONE]\n\n", "text/event-stream")

    def reply(self, text: str, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_call_a_server_that_runs(run: Run, stub: str) -> None:
    pytest.importorskip("openai")
    out = run("serve_and_call.py", "--url", stub, "--prompt", "hello")
    assert out == "tiny hello \nreasonalloc:compressions_total 6.0\n"


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm-long"
)
def test_serve_and_call(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    # vLLM's CPU kernels want heads of 32 numbers.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_tiny(tmp_path / "model", **sizes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = ("--model", model, "--budget", 64, "--port", port, "--prompt", "w1 w2 w3")
    server = ("--max-model-len", 512, "--kv-memory", "16MiB", "--enforce-eager", "--interval", 32)
    out = run("serve_and_call.py", *call, "--max-tokens", 150, *server)
    answer, *metrics = out.strip().splitlines()
    assert len(answer.split()) > 1
    counted = {m.partition("{")[0]: float(m.split()[-1]) for m in metrics}
    assert counted["reasonalloc:kv_bytes_per_sequence"] > 0
    assert len(counted) == 6


@api
def test_calibrate_then_best(run: Run, chatty: Path) -> None:
    sizes = ("--budget", 24, "--tokens", 100, "--max-new-tokens", 40, "--interval", 16)
    out = run("calibrate_then_best.py", "--model", chatty, *sizes)
    assert "budget" in out and Path("costs.json").is_file()


@api
def test_the_notebook_runs_from_top_to_bottom(
    chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    source = Path(__file__).parents[2] / "src"
    settings = {"REASONALLOC_MODEL": chatty, "REASONALLOC_TOKENS": 64, "HF_HUB_OFFLINE": 1}
    for name, value in {**settings, "PYTHONPATH": source}.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(_EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear outputs before a commit"
    nbclient.NotebookClient(
        notebook, timeout=PATIENCE, resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [
        output["data"].get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    assert len(shown) == 4 and all("<table" in html for html in shown)
    assert (tmp_path / "costs.json").is_file() and (tmp_path / "results/samples.jsonl").is_file()
