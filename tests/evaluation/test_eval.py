"""The eval command: results, resuming after kills, refusals."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

import tiny_folder
from patience import PATIENCE
from reasonalloc.cli import watch
from reasonalloc.cli.main import main
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import folder as run_folder
from reasonalloc.evaluation import solver
from reasonalloc.evaluation.runner import FIELDS
from reasonalloc.version import __version__
from tiny_boxed import save_tiny

Call = Callable[..., tuple[int, str, str]]
RUN = "import sys; from reasonalloc.cli.main import main; sys.exit(main())"
ARMS = "full,rkv,snapkv/uniform/reasonalloc"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


def arguments(model: Path, out: object, **changes: object) -> list[str]:
    """A small run: 3 arms, 4 problems, 2 samples each."""
    options: dict[str, object] = {
        "task": "chain(variables=2)",
        "arms": ARMS,
        "budgets": 24,
        "limit": 4,
        "samples": 2,
        "max_new_tokens": 40,
        "interval": 8,
        "window": 4,
        "batch_size": 3,
        "out": out,
    }
    options |= changes
    pairs = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, given in options.items()
        for value in (given if isinstance(given, tuple) else (given,))
    ]
    return ["eval", str(model), *(text for pair in pairs for text in pair)]


def read(out: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], dict[str, Any]], list[str]]:
    """Manifest, samples without what differs between runs, events."""
    first, *rows = (json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines())
    samples = {}
    for row in rows:
        assert tuple(row) == FIELDS
        assert row.pop("seconds") > 0 and row.pop("peak_bytes") > 0
        samples[row["arm"], row["budget"], row["problem"], row["sample"]] = row
    assert len(samples) == len(rows)  # nothing twice
    events = out / "events.jsonl"
    return first["manifest"], samples, sorted(events.read_text().splitlines())


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(model, out)) == 0
    return out


def test_samples_events_and_the_table(call: Call, model: Path, whole: Path, tmp_path: Path) -> None:
    manifest, samples, events = read(whole)
    assert len(samples) == 3 * 4 * 2
    assert manifest["samples"] == 2 and manifest["temperature"] == 0.6
    full = [s for s in samples.values() if s["budget"] is None]
    rest = [s for s in samples.values() if s["budget"] is not None]
    assert all(s["kv_bytes"] == s["full_kv_bytes"] and not s["compressions"] for s in full)
    assert all(s["kv_bytes"] < s["full_kv_bytes"] and s["compressions"] for s in rest)
    assert len({s["seed"] for s in full}) == 8 and len({s["completion"] for s in full}) > 4
    assert {(s["problem"], s["seed"]) for s in full} == {(s["problem"], s["seed"]) for s in rest}
    assert all((s["finish"] == "length") == (s["completion_tokens"] == 40) for s in full)
    for line in events:
        event = json.loads(line)
        assert set(event) == {"arm", "budget", "problem", "sample", "tokens", "layer", "budgets"}
        assert (event["problem"], event["sample"]) == ("chain-2-0", 0)
        assert len(event["budgets"]) == 4 and sum(event["budgets"]) == 4 * 24
    firsts = [s for s in rest if (s["problem"], s["sample"]) == ("chain-2-0", 0)]
    assert len(events) == sum(s["compressions"] for s in firsts)
    before = (whole / "samples.jsonl").read_bytes()
    code, out, err = call(*arguments(model, whole), "--json")
    assert code == 0 and "24 of 24 samples are in" in err
    data = json.loads(out)
    assert [r["n"] for r in data["results"]] == [8, 8, 8]
    for result in data["results"]:
        own = [s for s in samples.values() if s["arm"] == result["arm"]]
        assert result["correct"] == sum(s["correct"] for s in own)
        assert result["cap_hits"] == sum(s["finish"] == "length" for s in own)
        assert result["cut"] == result["cap_hits"] / 8 and result["went_on"] == 0
        low, high = result["cut_interval95"]
        assert low <= result["cut"] <= high and len(result["went_on_interval95"]) == 2
        low, high = result["interval95"]
        assert low <= result["pass_at_1"] <= high
    assert (whole / "samples.jsonl").read_bytes() == before
    code, out, _ = call(*arguments(model, whole))
    assert code == 0 and "rkv" in out and "95 % Wilson" in " ".join(out.split())


def test_no_result_depends_on_the_batch(
    call: Call, model: Path, whole: Path, tmp_path: Path
) -> None:
    code, _, err = call(*arguments(model, tmp_path, batch_size=8))
    assert code == 0, err
    _, found, events = read(tmp_path)
    _, expected, expected_events = read(whole)
    assert {row.pop("batch") for row in found.values()} == {8}
    assert {row.pop("batch") for row in expected.values()} == {2, 3}
    assert found == expected and events == expected_events


@pytest.mark.once
def test_arms_budgets_samples_and_limit_may_grow(
    call: Call, model: Path, whole: Path, tmp_path: Path
) -> None:
    both = (model / "costs.json", model / "profile.json")
    steps: list[dict[str, object]] = [
        {"arms": "full", "limit": 2, "samples": 1},
        {"arms": "rkv/uniform/uniform", "limit": 3},  # a preset by its parts
        {"limit": 3},
        {},
        {"arms": "reasonalloc,best", "profile": both, "limit": 1, "samples": 1},
        {"arms": "rkv", "budgets": "24,30", "limit": 1},
    ]
    for changes in steps:
        code, _, err = call(*arguments(model, tmp_path, **changes))
        assert code == 0, err
    manifest, found, _ = read(tmp_path)
    assert manifest["profiles"] == {"cost profile": str(both[0]), "profile": str(both[1])}
    assert set(manifest["arm_files"]) == {"best", "reasonalloc"}
    expected = read(whole)[1]
    extra = {key[:2] for key in found.keys() - expected.keys()}
    assert extra == {("reasonalloc", 24), ("best", 24), ("rkv", 30)}
    for key, row in expected.items():
        assert {**found[key], "batch": 0} == {**row, "batch": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "made with seed=0, now it is 1"),
        ({"window": 5}, "made with window=4, now it is 5"),
        ({"max_new_tokens": 41}, "made with max_new_tokens=40, now it is 41"),
        ({"temperature": 0.7}, "made with temperature=0.6, now it is 0.7"),
        ({"task": "chain(variables=3)"}, "made with data_hash="),
        ({"dtype": "bfloat16"}, "made with dtype='float32', now it is 'bfloat16'"),
    ],
)
@pytest.mark.once
def test_changed_settings(
    change: dict[str, object], message: str, call: Call, model: Path, whole: Path
) -> None:
    before = (whole / "samples.jsonl").read_bytes()
    code, out, err = call(*arguments(model, whole, **change))
    assert (code, out) == (2, "") and message in err
    assert (whole / "samples.jsonl").read_bytes() == before


@pytest.mark.once
def test_changed_files_of_an_arm(call: Call, model: Path, tmp_path: Path) -> None:
    """Named by the arm itself or by --profile; where a file lies does not matter."""
    costs, moved = tmp_path / "costs.json", tmp_path / "moved.json"
    costs.write_bytes((model / "costs.json").read_bytes())
    named = f"rkv/cost(path={costs})/uniform"
    small = {"limit": 1, "samples": 1}
    for arms, files in ((named, {}), ("best", {"profile": costs})):
        assert call(*arguments(model, tmp_path / arms[:4], arms=arms, **files, **small))[0] == 0
    costs.rename(moved)
    assert call(*arguments(model, tmp_path / "best", arms="best", profile=moved, **small))[0] == 0
    data = json.loads(moved.read_text())
    data["costs"][0][0][0][0] += 1.0
    costs.write_text(json.dumps(data))
    for arms, files in ((named, {}), ("best", {"profile": costs})):
        code, _, err = call(*arguments(model, tmp_path / arms[:4], arms=arms, **files, **small))
        assert code == 2 and f"was made with arm_files of {arms}=" in err


@pytest.mark.once
def test_changed_weights(call: Call, model: Path, tmp_path: Path) -> None:
    copy = save_tiny(tmp_path / "model")
    small = arguments(copy, tmp_path / "out", limit=1, arms="full")
    assert call(*small)[0] == 0
    from transformers import AutoModelForCausalLM

    changed = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    changed.save_pretrained(copy)
    code, _, err = call(*small)
    assert code == 2 and "made with weights_hash=" in err


@pytest.mark.once
def test_torn_lines_are_taken_again(call: Call, model: Path, whole: Path, tmp_path: Path) -> None:
    expected = read(whole)
    lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    events = (whole / "events.jsonl").read_bytes()
    samples = tmp_path / "samples.jsonl"
    # Killed while writing: the manifest; the first batch; its events, which were written before.
    for torn in (lines[0][:30], b"".join(lines[:4]) + lines[4][:50], b"".join(lines[:7])[:-1]):
        samples.write_bytes(torn)
        (tmp_path / "events.jsonl").write_bytes(events[:-20])
        code, _, err = call(*arguments(model, tmp_path))
        assert code == 0, err
        found = read(tmp_path)
        for _, rows, _ in (found, expected):
            for row in rows.values():
                row["batch"] = 0
        assert found == expected
    samples.write_text("hello")
    code, _, err = call(*arguments(model, tmp_path))
    assert code == 2 and "no file of such results" in err and samples.read_text() == "hello"


def start(arguments: list[str], run: str = RUN) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", run, *arguments], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def samples_in(out: Path) -> int:
    path = out / "samples.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_for(out: Path, samples: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + PATIENCE
    while samples_in(out) < samples and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)


# The moment is a number of calls after the first new sample: the same one on a slow machine.
KILLED = """
import os, signal, sys
from reasonalloc.cli.main import main
from reasonalloc.evaluation import records

left = int(sys.argv.pop())
append = records.append_lines

def count(frame, event, argument):
    global left
    left -= event == "call"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def appended(*arguments):
    append(*arguments)
    sys.setprofile(count)

records.append_lines = appended
sys.exit(main())
"""


@pytest.mark.long
@pytest.mark.once
def test_killed_at_random_moments(model: Path, whole: Path, tmp_path: Path) -> None:
    rng, before = random.Random(0), 0
    for _ in range(3):
        process = start([*arguments(model, tmp_path), str(rng.randrange(20_000))], KILLED)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL, err
        assert samples_in(tmp_path) > before  # goes on, not round in circles
        before = samples_in(tmp_path)
    process = start(arguments(model, tmp_path))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert read(tmp_path) == read(whole)


@pytest.mark.once
def test_ctrl_c(model: Path, tmp_path: Path) -> None:
    process = start(arguments(model, tmp_path, limit=200))
    wait_for(tmp_path, 4, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err and out == ""
    done = samples_in(tmp_path)
    assert f"interrupted: {done} of 1200 samples" in " ".join(err.split())


@pytest.mark.once
def test_out_of_memory_halves_the_batch(
    call: Call, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, most, sizes = solver.solve, [2], []

    def short(model: Any, prompts: Any, job: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > most[0] and job.budget is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, prompts, job, *rest)

    monkeypatch.setattr(solver, "solve", short)
    code, _, err = call(*arguments(model, tmp_path, batch_size=8))
    assert code == 0 and sizes[:4] == [8, 4, 2, 2], err
    assert err.count("out of memory") == 2 and "goes on in batches of 2" in err
    _, found, events = read(tmp_path)
    expected = read(whole)
    assert {row.pop("batch") for row in found.values()} == {2, 8}
    for row in expected[1].values():
        row.pop("batch")
    assert (found, events) == expected[1:]
    most[0] = 0
    code, _, err = call(*arguments(model, tmp_path, batch_size=8, limit=5))
    assert code == 2 and "one sequence alone does not fit into memory (full cache" in err
    assert read(tmp_path)[1].keys() >= found.keys()


def test_what_counts_as_little_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    assert solver.is_memory(error.value)
    assert solver.is_memory(RuntimeError("CUDA error: out of memory"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert solver.is_memory(RuntimeError(cublas))
    assert not solver.is_memory(RuntimeError("a bug"))


def test_other_runtime_errors_come_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(solver, "solve", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments(model, tmp_path))


@pytest.mark.once
def test_a_full_disk_loses_nothing(
    call: Call, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.write, [4000]

    def write(file: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{file}").readlink().name == "samples.jsonl":
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = data[: left[0]]
            left[0] -= len(data)
        return real(file, data)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "write", write)
    code, _, err = call(*arguments(model, tmp_path))
    assert code == 2 and "No space left on device; what is in it is complete" in err
    text = (tmp_path / "samples.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line) for line in text.splitlines()]
    monkeypatch.undo()
    assert call(*arguments(model, tmp_path))[0] == 0
    assert read(tmp_path) == read(whole)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "samples |" not in call(*arguments(model, tmp_path / "a", limit=1, arms="full"))[2]
    monkeypatch.setattr(watch, "LOG_SECONDS", 0.0)
    code, _, err = call(*arguments(model, tmp_path / "b", limit=3, arms="full"))
    assert code == 0 and re.search(r"note: 3 of 6 samples \| \d+ tok/s", err), err
    assert "note: 6 of 6 samples |" in err


def test_never_compressed_is_said(call: Call, model: Path, tmp_path: Path) -> None:
    run = arguments(model, tmp_path, arms="full,rkv", budgets="24,900", limit=1)
    code, out, err = call(*run, "--json")
    assert code == 0 and err.count("was never compressed") == 1
    assert "rkv at budget 900 was never compressed" in err
    assert [r["never_compressed"] for r in json.loads(out)["results"]] == [False, False, True]


@pytest.mark.once
def test_one_run_at_a_time(call: Call, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with run_folder.RunFolder(tmp_path):
        code, _, err = call(*arguments(model, tmp_path))
    assert code == 2 and "is being written by another run" in err
    assert call(*arguments(model, tmp_path, limit=1, arms="full"))[0] == 0


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[list[str]]:
    """A model without a chat template, and one problem of gsm8k."""
    folder = tiny_folder.save_tiny(tmp_path / "plain", chat=False)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "w1 w2 w3", "answer": "w4 #### 5"}) + "\n")
    out = tmp_path / "results"
    return arguments(folder, out, task="gsm8k", data=data, protocol="quick", samples=1)


def test_data_from_a_file_without_a_chat_template(call: Call, plain: list[str]) -> None:
    pytest.importorskip("math_verify")
    code, out, err = call(*plain, "--json")
    assert code == 0 and "no chat template" in err
    _, samples, _ = read(Path(plain[plain.index("--out") + 1]))
    (row,) = (s for s in samples.values() if s["arm"] == "full")
    assert row["prompt"].startswith("w1 w2 w3") and row["gold"] == "5" and row["answer"] is None
    assert json.loads(out)["results"][0]["correct"] == 0
    Path(plain[plain.index("--data") + 1]).write_text('{"question": "w1"}\n')
    code, _, err = call(*plain)
    assert code == 2 and "line 1: it has no answer, only question" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "math50"}, "did you mean 'math500'"),
        ({"arms": "full,rvk"}, "did you mean 'rkv'"),
        ({"arms": "rkv/unifrom/uniform"}, "did you mean 'uniform'"),
        ({"arms": ","}, "arms is empty"),
        ({"budgets": "24,x"}, "budget='x' must be a whole number of tokens, a size as"),
        ({"budgets": "3"}, "give a budget of at least 4"),
        ({"arms": "reasonalloc"}, "arm 'reasonalloc' reads a profile: add --profile FILE"),
        ({"profile": "p.json"}, "profile 'p.json' cannot be read"),
        ({"protocol": "papre"}, "did you mean 'paper'"),
        ({"temperature": 0}, "would be the same text each time"),
        ({"data": "x.jsonl"}, "no effect with task chain"),
        ({"limit": 0}, "--limit"),
        ({"max_new_tokens": 5000}, "give --max-new-tokens 40"),
        ({"out": "/proc/none"}, "cannot be used"),
        ({"out": os.devnull}, "is no folder: name one"),
        ({"device": "cuda:9"}, "is not available here"),
    ],
)
@pytest.mark.once
def test_wrong_arguments(
    change: dict[str, object], message: str, call: Call, model: Path, tmp_path: Path
) -> None:
    code, out, err = call(*arguments(model, **{"out": tmp_path, **change}))
    assert (code, out) == (2, "") and message in err and err.count("error:") == 1
    assert samples_in(tmp_path) == 0


def test_missing_extras(
    call: Call, model: Path, plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call(*plain)
    assert code == 2 and "pip install 'reasonalloc[eval]'" in err
    code, _, err = call(*arguments(model, tmp_path / "out"), "--workers", "2")
    assert code == 2 and "pip install 'reasonalloc[ray]'" in err


def test_files_that_do_not_fit_the_arms(call: Call, model: Path, tmp_path: Path) -> None:
    profile, costs = model / "profile.json", model / "costs.json"
    copy = tmp_path / "copy.json"
    copy.write_bytes(profile.read_bytes())
    for arms, files, message in (
        ("rkv", (profile,), "is a profile and has no effect with arms='rkv'"),
        ("reasonalloc", (profile, costs), "is a cost profile and has no effect"),
        ("best", (profile,), f"arm 'best' reads a cost profile, not '{profile}'"),
        ("reasonalloc,best", (profile,), "arm 'best' reads a cost profile, not"),
        ("reasonalloc", (profile, copy), "are both a profile: give one of each kind"),
    ):
        code, _, err = call(*arguments(model, tmp_path / "out", arms=arms, profile=files))
        assert code == 2 and message in err, (arms, err)


def test_a_grown_manifest_keeps_what_follows(tmp_path: Path) -> None:
    from reasonalloc.evaluation.records import ResultFile

    path = tmp_path / "results"

    def file(files: dict[str, int], **more: Any) -> ResultFile:
        manifest = {"a": 1, "files": files, "note": files}
        return ResultFile(path, manifest, grows=("files",), free=("note",), **more)

    file({}).add({"x": 1}, {"x": 2})
    file({"p": 3}).add({"x": 3})
    kept = file({"q": 4}, keep=lambda r: {"y": r["x"]})
    assert kept.rows == [{"y": 1}, {"y": 2}, {"y": 3}]
    both = {"p": 3, "q": 4}
    first = {"manifest": {"a": 1, "files": both, "note": both}}
    assert json.loads(path.read_text().splitlines()[0]) == first
    with pytest.raises(UsageError, match="made with files of p=3, now it is 5"):
        file({"p": 5})


def test_the_code_is_part_of_the_manifest(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another state of the code may go on, and both are noted."""
    small = {"limit": 1, "samples": 1, "arms": "rkv"}
    assert call(*arguments(model, tmp_path, **small))[0] == 0
    first = read(tmp_path)[0]["code"]
    assert list(first.values()) == [__version__] and len(next(iter(first))) == 16
    monkeypatch.setattr("reasonalloc.evaluation.manifest.code_hash", lambda: "changed")
    assert call(*arguments(model, tmp_path, **{**small, "limit": 2}))[0] == 0
    assert read(tmp_path)[0]["code"] == {**first, "changed": __version__}
