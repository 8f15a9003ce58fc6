"""The generated task ``chain``: variable graphs whose solution looks things up far back.

A problem is a shuffled list of definitions over letter-and-digit names, arithmetic modulo 10:
``n7 c7 b2 , n7 +`` says that n7 is made of c7 and b2, by adding them. The *spine* is the path from
the goal through first operands down to an input; the second operand of a spine variable is any
earlier spine variable or any input, so that its value has to be looked up far back. Distractors
are defined in the prompt and never needed.

The solution (the chain of thought) has four parts, each of them made of look-ups:

1. ``plan``: from the goal down the first operands to an input (look-ups in the prompt);
2. ``solve``: the plan backwards, one step a variable: its operands from the prompt, each operand
   with its value (stated earlier, far back), its operation from the prompt, its result;
3. ``check``: for every variable that the prompt asks to verify, recall its result, then look its
   operands, their values and its operation up and compute it again;
4. ``answer``: the goal with its value.

Every look-up is a bigram on purpose: what follows a name depends on the kind of word asked for (a
name, a digit or an operation), so that a tiny model learns each of them by plain induction.
Definitions written ``n7 = c7 + b2`` are readable too and took the same model far longer.

Every token is a word separated by single spaces, so that ``text.split()`` is the tokenization.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

Split = Literal["train", "calibration", "test"]

MODULUS: Final = 10
MIN_VARIABLES: Final = 2
MAX_VARIABLES: Final = 64
#: Difficulties of the published task; fewer variables are for warming a model up only.
DIFFICULTIES: Final = (8, 12, 16, 24, 32, 48, 64)

NAMES: Final = tuple(f"{letter}{digit}" for letter in "abcdefghijklmnop" for digit in range(8))
DIGITS: Final = tuple(str(value) for value in range(MODULUS))
WORDS: Final = (
    *("given", "define", "verify", "find", "plan", "solve", "check", "recall", "answer", "ok"),
    *("=", "+", "-", "<-", "->", ":", ",", ";", "."),
)
#: Every word of the task, in a fixed order (the tokenizer's vocabulary without special tokens).
VOCABULARY: Final = (*WORDS, *DIGITS, *NAMES)

_SPLIT_OFFSET: Final[dict[str, int]] = {"train": 0, "calibration": 1, "test": 2}
_DEFINITION = re.compile(r"([a-p][0-7]) ([a-p][0-7]) ([a-p][0-7]) , \1 ([+-]) ;")
_GIVEN = re.compile(r"([a-p][0-7]) ([0-9]) ;")
_FIND = re.compile(r"find ([a-p][0-7]) \.")
#: What completions answer with: name and digit.
ANSWER: Final = re.compile(r"answer ([a-p][0-7]) ([0-9]) \.")


@dataclass(frozen=True)
class Definition:
    """``name`` is ``first op second``, with ``op`` one of ``+`` and ``-``."""

    name: str
    first: str
    op: str
    second: str

    def text(self) -> str:
        """Return the definition as it stands in prompts."""
        return f"{self.name} {self.first} {self.second} , {self.name} {self.op}"


@dataclass(frozen=True)
class ChainProblem:
    """One problem: its texts, the exact answer, and where it comes from."""

    prompt: str
    solution: str
    answer: str
    variables: int
    seed: int
    split: Split

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens, without special tokens."""
        return self.prompt.count(" ") + 1

    @property
    def solution_tokens(self) -> int:
        """Length of the chain of thought and its answer in tokens, without special tokens."""
        return self.solution.count(" ") + 1


@dataclass(frozen=True)
class ChainGrade:
    """What the grader says of one completion."""

    correct: bool
    expected: str
    found: str | None
    reason: str


def check_count(variables: int) -> int:
    """Return how many results the prompt asks to verify: 8 at 8 variables, 16 at 64."""
    return min(variables, 8 + max(0, variables - 8) // 7)


def problem_key(split: Split, seed: int) -> int:
    """Return the number that seeds a problem's generator; splits are disjoint residues of 3."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return 3 * seed + _SPLIT_OFFSET[split]


def generate(seed: int, variables: int, split: Split = "test") -> ChainProblem:
    """Generate the problem number ``seed`` of a split with ``variables`` needed variables.

    The same arguments always give the same problem. Problems of different splits are drawn from
    disjoint generator keys (:func:`problem_key`).
    """
    if not MIN_VARIABLES <= variables <= MAX_VARIABLES:
        raise ValueError(f"variables must be {MIN_VARIABLES} to {MAX_VARIABLES}, got {variables}")
    rng = random.Random(problem_key(split, seed) * 128 + variables)
    inputs = 2 + variables // 8
    distractors = 1 + variables // 4
    names = rng.sample(NAMES, inputs + variables + distractors)
    given = {name: rng.randrange(MODULUS) for name in names[:inputs]}
    spine_names = names[inputs : inputs + variables]
    spine = _spine(rng, list(given), spine_names)
    # A distractor uses anything defined before it; nothing that is needed uses a distractor.
    # Its first operand is never one of the spine's, which keeps ``first second`` unambiguous.
    extra = []
    firsts = [name for name in given if name != spine[0].first]
    for index in range(inputs + variables, len(names)):
        extra.append(Definition(names[index], *_operands(rng, rng.choice(firsts), names[:index])))
        firsts.append(names[index])
    values = dict(given)
    for item in spine:
        values[item.name] = compute(values[item.first], item.op, values[item.second])
    verify = rng.sample(spine_names, check_count(variables))
    goal = spine_names[-1]
    lines = [item.text() for item in rng.sample(spine + extra, len(spine) + len(extra))]
    inputs_text = " ; ".join(f"{name} {given[name]}" for name in rng.sample(list(given), inputs))
    prompt = (
        f"given {inputs_text} ; define {' ; '.join(lines)} ; "
        f"verify {' , '.join(verify)} . find {goal} ."
    )
    return ChainProblem(
        prompt=prompt,
        solution=_solution(spine, values, verify),
        answer=str(values[goal]),
        variables=variables,
        seed=seed,
        split=split,
    )


def problems(
    count: int, variables: int, split: Split = "test", start: int = 0
) -> Iterator[ChainProblem]:
    """Yield ``count`` problems of one difficulty, with consecutive seeds from ``start``."""
    for seed in range(start, start + count):
        yield generate(seed, variables, split)


def compute(first: int, op: str, second: int) -> int:
    """Apply ``+`` or ``-`` modulo 10."""
    if op == "+":
        return (first + second) % MODULUS
    if op == "-":
        return (first - second) % MODULUS
    raise ValueError(f"unknown operation {op!r}")


def solve_prompt(prompt: str) -> tuple[str, int]:
    """Work out a prompt's goal and answer from its text alone."""
    head, _, rest = prompt.partition(" verify ")
    goal = _FIND.search(rest)
    if goal is None:
        raise ValueError("the prompt names no goal")
    given_text, _, define_text = head.partition(" define ")
    values = {name: int(digit) for name, digit in _GIVEN.findall(given_text + " ")}
    definitions = {
        name: Definition(name, first, op, second)
        for name, first, second, op in _DEFINITION.findall(define_text + " ")
    }
    pending = [goal.group(1)]
    waiting: set[str] = set()
    while pending:
        name = pending[-1]
        if name in values:
            pending.pop()
            continue
        item = definitions.get(name)
        if item is None:
            raise ValueError(f"the prompt does not define {name}")
        missing = [operand for operand in (item.first, item.second) if operand not in values]
        if missing:
            if name in waiting:
                raise ValueError(f"the definition of {name} is circular")
            waiting.add(name)
            pending.extend(missing)
            continue
        values[name] = compute(values[item.first], item.op, values[item.second])
        pending.pop()
    return goal.group(1), values[goal.group(1)]


def grade(prompt: str, completion: str) -> ChainGrade:
    """Grade a completion by its last ``answer NAME DIGIT .``, recomputing from the prompt."""
    goal, value = solve_prompt(prompt)
    expected = str(value)
    answers = ANSWER.findall(completion)
    if not answers:
        return ChainGrade(False, expected, None, "no answer")
    name, digit = answers[-1]
    if name != goal:
        return ChainGrade(False, expected, digit, f"answers {name}, not {goal}")
    if digit != expected:
        return ChainGrade(False, expected, digit, "wrong value")
    return ChainGrade(True, expected, digit, "correct")


def _operands(rng: random.Random, first: str, pool: list[str]) -> tuple[str, str, str]:
    return first, rng.choice("+-"), rng.choice(pool)


def _spine(rng: random.Random, inputs: list[str], names: list[str]) -> list[Definition]:
    """Define each name by the one before it and any earlier one; the first by inputs alone."""
    spine: list[Definition] = []
    previous = rng.choice(inputs)
    earlier = list(inputs)
    for name in names:
        # ``x - x`` would forget everything that came before.
        pool = [candidate for candidate in earlier if candidate != previous]
        spine.append(Definition(name, *_operands(rng, previous, pool)))
        earlier.append(name)
        previous = name
    return spine


def _solution(spine: list[Definition], values: dict[str, int], verify: list[str]) -> str:
    by_name = {item.name: item for item in spine}
    goal = spine[-1].name
    plan = " , ".join(f"{item.name} {item.first}" for item in reversed(spine))
    parts = [f"plan {plan} ; solve"]
    parts.extend(f"{_step(item, values)} ;" for item in spine)
    parts.append("check")
    for name in verify:
        parts.append(f"recall {name} {values[name]} ; {_step(by_name[name], values)} ok ;")
    parts.append(f"answer {goal} {values[goal]} .")
    return " ".join(parts)


def _step(item: Definition, values: dict[str, int]) -> str:
    first, second = values[item.first], values[item.second]
    return (
        f"{item.name} {item.first} {item.second} : {item.first} {first} {item.second} {second} , "
        f"{item.name} {item.op} -> {item.name} {values[item.name]}"
    )
