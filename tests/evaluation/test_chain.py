"""Tests of the generated task ``chain``."""

from __future__ import annotations

import re

import pytest

from reasonalloc.evaluation.tasks import chain


@pytest.mark.parametrize("variables", chain.DIFFICULTIES)
def test_solutions_are_graded_correct_and_have_the_lengths_promised(variables: int) -> None:
    for problem in chain.problems(5, variables):
        result = chain.grade(problem.prompt, problem.solution)
        assert result.correct and result.expected == problem.answer
        assert 300 <= problem.solution_tokens <= 2000
        assert set(problem.prompt.split()) <= set(chain.VOCABULARY)
        assert set(problem.solution.split()) <= set(chain.VOCABULARY)


def test_lengths_depend_on_the_difficulty_alone() -> None:
    lengths = {
        (item.prompt_tokens, item.solution_tokens) for item in chain.problems(20, 16, "train")
    }
    assert len(lengths) == 1


def test_the_same_arguments_give_the_same_problem() -> None:
    assert chain.generate(7, 12) == chain.generate(7, 12)
    assert chain.generate(7, 12).prompt != chain.generate(8, 12).prompt


def test_splits_draw_from_disjoint_keys() -> None:
    splits: tuple[chain.Split, ...] = ("train", "calibration", "test")
    keys = [{chain.problem_key(split, seed) for seed in range(1000)} for split in splits]
    assert len(set.union(*keys)) == 3000
    assert len({chain.generate(3, 8, split).prompt for split in splits}) == 3


def test_distractors_are_never_named_in_the_solution() -> None:
    for problem in chain.problems(20, 24):
        define = problem.prompt.split(" define ")[1].split(" verify ")[0]
        defined = {line.split()[0] for line in define.split(" ; ")}
        assert len(defined) == 24 + 24 // 4 + 1
        assert len(defined & set(problem.solution.split())) == 24


def test_the_solution_states_what_its_definitions_say() -> None:
    problem = chain.generate(5, 16)
    values = dict(chain._GIVEN.findall(problem.prompt.split(" define ")[0] + " "))
    solve = problem.solution.split(" solve ")[1].split(" check ")[0]
    for step in solve.rstrip(" ;").split(" ; "):
        names, operands, result = re.split(" [:,] ", step)
        first, one, second, two = operands.split()
        name, op, _, again, value = result.split()
        assert f" {names} , {name} {op} ;" in problem.prompt
        assert names == f"{name} {first} {second}" and again == name
        assert values[first] == one and values[second] == two
        assert chain.compute(int(one), op, int(two)) == int(value)
        values[name] = value


def test_the_grader_takes_the_last_answer_and_says_why_not() -> None:
    problem = chain.generate(1, 8)
    goal = problem.solution.split()[-3]
    other = next(name for name in chain.NAMES if name != goal)
    wrong = str((int(problem.answer) + 1) % 10)
    text = f"answer {goal} {wrong} . answer {goal} {problem.answer} ."
    assert chain.grade(problem.prompt, text).correct
    assert chain.grade(problem.prompt, f"answer {goal} {wrong} .").reason == "wrong value"
    assert chain.grade(problem.prompt, f"answer {goal} {problem.answer}").reason == "no answer"
    assert not chain.grade(problem.prompt, f"answer {other} {problem.answer} .").correct
    assert chain.grade(problem.prompt, "").found is None


def test_the_answer_is_recomputed_from_the_prompt() -> None:
    prompt = "given a0 7 ; b0 5 ; define c1 a0 b0 , c1 + ; d1 c1 b0 , d1 - ; verify c1 . find d1 ."
    assert chain.solve_prompt(prompt) == ("d1", 7)
    assert chain.grade(prompt, "answer d1 7 .").correct


@pytest.mark.parametrize(
    "prompt",
    [
        "given a0 7 ; define c1 a0 a0 , c1 + ; verify c1 .",
        "given a0 7 ; define c1 a0 b0 , c1 + ; verify c1 . find c1 .",
        "given a0 7 ; define c1 c2 a0 , c1 + ; c2 c1 a0 , c2 + ; verify c1 . find c1 .",
        "",
    ],
)
def test_broken_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError):
        chain.solve_prompt(prompt)


@pytest.mark.parametrize("variables", [1, 65])
def test_difficulties_out_of_range_are_refused(variables: int) -> None:
    with pytest.raises(ValueError, match="variables"):
        chain.generate(0, variables)
    with pytest.raises(ValueError, match="seed"):
        chain.generate(-1, 8)
