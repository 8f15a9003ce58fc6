"""Tasks: reading data, finding answers, marking them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from reasonalloc.errors import UsageError
from reasonalloc.evaluation import grading
from reasonalloc.evaluation.endings import went_on
from reasonalloc.evaluation.tasks import chain
from reasonalloc.evaluation.tasks.base import TASKS, Problem
from reasonalloc.evaluation.tasks.boxed_math import BoxedMath

ROWS = {
    "math500": {"problem": "Half?", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"},
    "aime24": {"id": 60, "problem": "How many?", "answer": "204"},
    "aime25": {"id": "3", "problem": "How many?", "answer": 70},
    "gsm8k": {"question": "How much?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
}


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def test_the_registry_has_every_task() -> None:
    assert set(TASKS.entries()) == {*ROWS, "chain"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("math500", ("test/a/1.json", "Half?", "\\frac{1}{2}")),
        ("aime24", ("60", "How many?", "204")),
        ("aime25", ("3", "How many?", "70")),
        ("gsm8k", ("0", "How much?", "1200")),
    ],
)
def test_rows_of_every_task(name: str, expected: tuple[str, str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS[name], "")
    (problem,) = TASKS.create(name).load(path, None).chosen
    text = f"{expected[1]}\n\nPlease reason step by step, and put your final answer within "
    assert problem == Problem(expected[0], text + "\\boxed{}.", expected[2])


def test_an_answer_in_degrees(tmp_path: Path) -> None:
    row = {**ROWS["aime25"], "answer": "336^\\circ"}
    (problem,) = TASKS.create("aime25").load(write(tmp_path / "data", row), None).chosen
    assert TASKS.create("aime25").grade(problem, r"it is \boxed{336}").correct


def test_limits_and_hashes(tmp_path: Path) -> None:
    rows = [{**ROWS["aime24"], "id": i} for i in range(5)]
    task = TASKS.create("aime24")
    whole = task.load(write(tmp_path / "a", *rows), None)
    some = task.load(str(tmp_path / "a"), 2)
    assert some.chosen == whole.chosen[:2] and some.hash == whole.hash
    rows[4]["answer"] = "205"
    assert task.load(write(tmp_path / "b", *rows), 2).hash != whole.hash


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("gsm8k", {"question": "How much?", "answer": "1200"}, "no '####'"),
        ("gsm8k", {"question": "How much?", "answer": "so #### many"}, "no '####'"),
        ("aime24", {"problem": "How many?", "answer": "1000"}, "no whole number from 0 to 999"),
        ("aime25", ROWS["gsm8k"], "no whole number from 0 to 999"),
        ("math500", {"problem": "Half?", "solution": "x"}, "it has no answer, only problem, sol"),
        ("math500", {"problem": " ", "answer": "1"}, "problem=' ' must be text"),
        ("aime24", "{", "no valid JSON"),
        ("aime24", "[1]", "must be a JSON object"),
        ("aime24", ROWS["aime24"], "a second problem is called '60'"),
    ],
)
def test_bad_lines_are_named(name: str, line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS[name], line)
    with pytest.raises(UsageError) as error:
        TASKS.create(name).load(path, None)
    assert message in str(error.value) and "line 2" in str(error.value)


def test_unreadable_data(tmp_path: Path) -> None:
    task = TASKS.create("aime24")
    with pytest.raises(UsageError, match="cannot be read"):
        task.load(str(tmp_path / "none"), None)
    with pytest.raises(UsageError, match="holds no problem"):
        task.load(write(tmp_path / "empty"), None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        task.load(str(tmp_path / "binary"), None)


def test_chain_is_the_generated_task() -> None:
    task = TASKS.create("chain(variables=4)")
    loaded = task.load(None, 3).chosen
    hashes = [
        TASKS.create(f"chain(variables={v})").load(None, n).hash for v, n in ((4, 60), (5, 3))
    ]
    assert task.load(None, 3).hash == hashes[0] != hashes[1]
    originals = list(chain.problems(3, 4))
    assert [p.prompt for p in loaded] == [p.prompt for p in originals]
    assert [p.id for p in loaded] == ["chain-4-0", "chain-4-1", "chain-4-2"]
    verdicts = [task.grade(p, o.solution) for p, o in zip(loaded, originals, strict=True)]
    assert all(v.correct for v in verdicts)
    assert [v.answer for v in verdicts] == [p.gold for p in loaded]
    assert task.grade(loaded[0], "answer none .").answer is None
    for spec in ("chain(variables=1)", "chain(variables=65)"):
        with pytest.raises(UsageError, match="must be from 2 to 64"):
            TASKS.create(spec)
    with pytest.raises(UsageError, match="no effect with task chain"):
        task.load("data.jsonl", None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\text{a {b {c}}}} done", r"\text{a {b {c}}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{3} \boxed {4}", "4"),
        (
            r"the set \boxed{\left\{ \sqrt{\frac{1}{2}} \right\}}$.",
            r"\left\{ \sqrt{\frac{1}{2}} \right\}",
        ),
        (r"first \boxed{1}, then \boxed{\frac{1}{", None),
        (r"\boxed{}", None),
        ("the answer is 2", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, answer: str | None) -> None:
    assert grading.last_box(text) == answer


class Arithmetic(BoxedMath):
    def problem(self, row: dict[str, object], index: int) -> Problem:
        raise UsageError("none")


def mark(gold: str, completion: str) -> bool:
    return Arithmetic().grade(Problem("x", "?", gold), completion).correct


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
        ("(1,2]", r"\boxed{(1, 2]}", True),
        ("(1,2]", r"\boxed{[1, 2]}", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        ("5", r"\boxed{5 \text{ cm}}", True),
        (r"5\text{ cm}", r"\boxed{5}", True),
        (r"90^\circ", r"\boxed{90}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Bob}}", False),
        ("1200", r"\boxed{1,200}", True),
        ("70000", r"\boxed{70\,000}", True),
        ("1234567", r"\boxed{1{,}234{,}567 \text{ dollars}}", True),
        (r"10,\!080", r"\boxed{10080}", True),
        ("1200", r"\boxed{1,200.50}", False),
        ("50", r"\boxed{50\%}", True),
        (r"50\%", r"\boxed{0.5}", True),
        (r"50\%", r"\boxed{5}", False),
        (r"(-\infty,-2)\cup(3,\infty)", r"\boxed{(-\infty, -2) \cup (3, \infty)}", True),
        (r"(-\infty,-2)\cup(3,\infty)", r"\boxed{(-\infty, -2] \cup (3, \infty)}", False),
        (r"\text{(C)}", r"\boxed{C}", True),
        ("1,-2", r"\boxed{-2,1}", True),
        ("(3,5)", r"\boxed{(5,3)}", False),
        ("73", r"\boxed{073}", True),
        ("18", r"\boxed{\$18}", True),
        ("2", r"first \boxed{3}, in the end \boxed{x = 2}", True),
        ("3", r"first \boxed{3}, in the end \boxed{2}", False),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}", True),
        ("7", "the answer is 7", False),
        ("7", r"\boxed{7", False),
    ],
)
def test_marks(gold: str, answer: str, correct: bool) -> None:
    pytest.importorskip("math_verify")
    assert mark(gold, answer) is correct


def test_the_gold_answer_comes_first() -> None:
    """Math-verify takes an interval for an inequality that was asked for, and not the reverse."""
    pytest.importorskip("math_verify")
    assert mark("1 < x < 2", r"\boxed{(1,2)}") and not mark("(1,2)", r"\boxed{1 < x < 2}")


def test_marks_from_threads() -> None:
    pytest.importorskip("math_verify")
    found: list[bool] = []

    def work(number: int) -> None:
        found.append(mark(str(number), rf"\boxed{{\frac{{{2 * number}}}{{2}}}}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_an_answer_without_end_is_given_up() -> None:
    pytest.importorskip("math_verify")
    grader = grading.MathGrader(timeout=5.0)
    try:
        assert grader.equal("4", r"\frac{8}{2}")
        began = time.monotonic()
        assert not grader.equal("5", "9^{9^{9^{9}}}")
        assert time.monotonic() - began < 300 and grader.given_up == 1
        assert grader.equal("4", r"\frac{8}{2}")  # by another process
    finally:
        grader.close()


def test_math_verify_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'reasonalloc\[eval\]'"):
        grading.MathGrader()


def test_datasets_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"reasonalloc\[eval\].*--data FILE"):
        TASKS.create("math500").load(None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is \\boxed{4}.", False),
        ("It is \\boxed{4}." + " so" * 90, True),
        ("It is \\boxed{4}." + " so" * 60, False),  # 60 tokens are not more than 64
        ("so " * 90 + "It is \\boxed{\\frac{1}{2}}.", False),
        ("so " * 90, False),  # no answer
        ("\\boxed{}" + " so" * 90, False),
        ("\\boxed{4" + " so" * 90, False),
        ("\\boxed{4} then \\boxed{5" + " so" * 90, True),  # whatever the grader makes of it
        ("Is it \\boxed{4}?" + " so" * 90 + "</think>\n\\boxed{4}", False),
        ("<think></think>\n\\boxed{4}." + " so" * 90, True),
        ("\\boxed{4}.\n\nHuman: What is", True),
        ("\\boxed{4}.\nuser\nWhat is", True),
        ("\\boxed{4}.<|im_start|>user", True),
        ("\\boxed{4}. The user is happy", False),
        ("plan b2 ; answer n7 4 .", False),
        ("plan b2 ; answer n7 4 ." + " so" * 90, True),
        (None, False),
    ],
)
def test_samples_that_go_on_after_their_answer(text: str | None, expected: bool) -> None:
    assert went_on(text, len((text or "").split())) is expected


def test_the_first_box_of_a_chain_without_end_is_found_at_once() -> None:
    assert grading.first_box_end("\\boxed{" * 100_000) is None
