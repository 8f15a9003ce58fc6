"""Workflows, hooks and the Makefile fit together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

_ROOT = Path(__file__).parents[2]
_WORKFLOWS = sorted((_ROOT / ".github/workflows").glob("*.yml"))
_TEXTS = [*_WORKFLOWS, _ROOT / ".ci/run", _ROOT / "CONTRIBUTING.md", _ROOT / "README.md"]


def targets() -> set[str]:
    """Targets of the Makefile that a person may call."""
    lines = (_ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ").splitlines()
    return {t for line in lines if line.startswith(".PHONY:") for t in line.split()[1:]}


def jobs(path: Path) -> dict[str, Any]:
    parsed = yaml.safe_load(path.read_text("utf-8"))
    assert True in parsed, "YAML reads the key 'on' as true"
    return dict(parsed["jobs"])


def commands(job: dict[str, Any]) -> list[str]:
    """What a job runs, once for every entry of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    runs = [step["run"] for step in job["steps"] if "run" in step]
    filled = []
    for row in matrix.get("include", [{}]):
        for run in runs:
            for key, value in row.items():
                run = run.replace("${{ matrix." + key + " }}", str(value))
            filled.append(run)
    return filled


@pytest.mark.parametrize("path", _TEXTS, ids=lambda p: p.name)
def test_every_make_target_that_is_called_exists(path: Path) -> None:
    if path.suffix == ".yml":
        text = "\n".join(run for job in jobs(path).values() for run in commands(job))
    else:
        text = path.read_text("utf-8")
    lines = re.findall(r"^\s*(?:`|\$ )?make ((?:[\w=.-]+ *)+)", text, re.MULTILINE)
    named = [word for line in lines for word in line.split()]
    called = {word for word in named if re.fullmatch("[a-z][a-z-]*", word)}
    called |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert called <= targets(), called - targets()
    assert called or path.name == "release.yml"


def test_the_workflow_calls_every_kind_of_check() -> None:
    runs = {
        run for job in jobs(_ROOT / ".github/workflows/ci.yml").values() for run in commands(job)
    }
    wanted = ("check", "suite", "test-oldest", "test-newest", "test-vllm", "docs", "coverage")
    wanted += ("test-vllm-next",)
    assert {f"make {name}" for name in wanted} <= runs


def test_python_versions_are_those_of_the_package() -> None:
    suite = jobs(_ROOT / ".github/workflows/ci.yml")["suite"]
    versions = suite["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={versions[0]}"' in (_ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("path", _WORKFLOWS, ids=lambda p: p.name)
def test_jobs_are_complete(path: Path) -> None:
    known = jobs(path)
    for name, job in known.items():
        assert job["runs-on"] and job["timeout-minutes"], name
        assert {job.get("needs", name)} <= set(known), name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


def test_only_the_publishing_job_may_ask_for_an_identity() -> None:
    release = jobs(_ROOT / ".github/workflows/release.yml")
    asks = {n for n, job in release.items() if job.get("permissions", {}).get("id-token")}
    assert asks == {"pypi"} and release["pypi"]["environment"]["name"] == "pypi"


def test_hooks_call_tools_of_the_environment_that_make_sets_up() -> None:
    config = yaml.safe_load((_ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    makefile = (_ROOT / "Makefile").read_text("utf-8")
    for hook in hooks:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(BIN)/{tool}" in makefile, tool
