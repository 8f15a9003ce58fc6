"""How a sample ends: whether it went on after its answer."""

from __future__ import annotations

import re
from typing import Any, Final

from reasonalloc.evaluation.grading import first_box_end
from reasonalloc.evaluation.tasks.chain import ANSWER

#: Tokens that may follow an answer: the end of its sentence, a closing remark.
TOKENS_AFTER: Final = 64
_THOUGHT_END = "</think>"
# A role that starts another turn: as a word with a colon, alone on its line (what a template's
# tokens leave in a text without special tokens), or as a template's token.
_TURN = re.compile(
    r"\b(?:Human|User|Assistant)\s*:|^[ \t]*(?:human|user|assistant|system)[ \t]*$"
    r"|<\|(?:im_start|start_header_id|user|assistant|system)\|>"
    r"|<start_of_turn>|<｜(?:User|Assistant)｜>|\[INST\]",  # noqa: RUF001 (DeepSeek's own bars)
    re.MULTILINE,
)


def went_on(completion: Any, tokens: int) -> bool:
    """Return whether a sample gave an answer and then went on.

    The answer is the first whole ``\\boxed{...}`` that is not empty, or the first ``answer NAME
    DIGIT .`` of the task ``chain``; where the completion has a ``</think>``, the first behind it.
    A sample went on if more than ``TOKENS_AFTER`` tokens follow its answer, or a marker of another
    turn (``Human:``, ``User:``, ``Assistant:``, a role alone on a line, a token such as
    ``<|im_start|>``). Samples without such an answer did not go on.

    Args:
        completion: its text; anything else has no answer.
        tokens: how many were generated. Those behind the answer are estimated by the share of
            characters, so that saved samples say it too.
    """
    end = _answer_end(completion) if isinstance(completion, str) else None
    if end is None:
        return False
    after = len(completion) - end
    return tokens * after > TOKENS_AFTER * len(completion) or bool(_TURN.search(completion, end))


def _answer_end(text: str) -> int | None:
    """Where the first answer ends, in characters; None if there is none."""
    start = max(text.find(_THOUGHT_END), 0)
    found = ANSWER.search(text, start)
    ends = [first_box_end(text, start), found.end() if found else None]
    return min((end for end in ends if end is not None), default=None)
