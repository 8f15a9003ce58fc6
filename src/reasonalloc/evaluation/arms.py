"""Run arms on chain problems: one batch, greedy, graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonalloc.core.recorder import Event
from reasonalloc.evaluation.batch import Job, Settings, Watch, solve
from reasonalloc.evaluation.tasks.chain import ChainProblem, grade

#: Tokens that a completion may be longer than the exact chain, end tokens included.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class ArmResult:
    """What one job did.

    Attributes:
        job: arm and budget.
        correct: per problem, whether the answer is right.
        exact: per problem, whether the whole chain is the exact one, word for word.
        prompts: per problem, token ids of the prompt.
        completions: per problem, generated token ids, up to the end token and with it.
        kv_bytes: bytes of keys and values per sequence, see ``BatchResult``.
        seconds: wall time of the whole ``generate`` call.
        prefill_seconds: wall time until every sequence had its first token.
        compressions: layer compressions; 0 with a budget means that it never came to one.
        events: what the recorder kept.
    """

    job: Job
    correct: tuple[bool, ...]
    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    kv_bytes: int
    seconds: float
    prefill_seconds: float
    compressions: int = 0
    events: tuple[Event, ...] = ()
    exact: tuple[bool, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all sequences per second of wall time, reading prompts included."""
        return sum(len(c) for c in self.completions) / self.seconds if self.seconds > 0 else 0.0


def run_job(
    model: Any,
    tokenizer: Any,
    problems: Sequence[ChainProblem],
    job: Job,
    settings: Settings,
    watch: Watch = lambda _: True,
) -> ArmResult:
    """Solve the problems in one batch, greedily, until every sequence has ended.

    Raises:
        Stopped: ``watch`` returned False.
    """
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    limit = settings.max_new_tokens
    if limit is None:
        limit = max(problem.solution_tokens for problem in problems) + SPARE_TOKENS
    result = solve(model, prompts["input_ids"], job, settings, limit, watch)
    texts = tokenizer.batch_decode(result.completions, skip_special_tokens=True)
    pairs = list(zip(problems, texts, strict=True))
    return ArmResult(
        job=job,
        correct=tuple(grade(problem.prompt, text).correct for problem, text in pairs),
        exact=tuple(text.split() == problem.solution.split() for problem, text in pairs),
        prompts=tuple(tuple(prompt) for prompt in prompts["input_ids"]),
        completions=result.completions,
        kv_bytes=result.kv_bytes // len(problems),
        seconds=result.seconds,
        prefill_seconds=result.prefill_seconds,
        compressions=result.compressions,
        events=result.events,
    )
