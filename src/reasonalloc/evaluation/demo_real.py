"""The demo on SmolLM2-135M-Instruct: one problem, the full cache and three arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.integrations.hf.watch import Progress, Sampling, watched
from reasonalloc.tables import Table, human
from reasonalloc.texts import encode_messages

PROBLEM = (
    "A bakery bakes 12 trays of rolls with 15 rolls on each tray. In the morning it sells 87 "
    "rolls, and at noon a school buys half of the rolls that are left over. How many rolls remain? "
    "Think step by step."
)
ARMS = ("full", "rkv", "snapkv", "streaming_llm")
BUDGET, INTERVAL, NEW_TOKENS = 64, 32, 200
HONEST = (
    "SmolLM2-135M is far too small to do maths: do not look for a right answer. What this shows is "
    "how long each text stays the full cache's, how much memory it takes, and how fast it is."
)


@dataclass(frozen=True)
class Result:
    """One arm's generation.

    Attributes:
        arm: its name.
        state: text, tokens, times and bytes.
        parts_at: index of the first generated token that differs from the full cache's, or None.
    """

    arm: str
    state: Progress
    parts_at: int | None

    @property
    def same_tokens(self) -> int:
        """Generated tokens before the text parts from the full cache's."""
        return len(self.state.tokens) if self.parts_at is None else self.parts_at

    def data(self) -> dict[str, Any]:
        """The result for ``--json``; sizes in bytes, times in seconds."""
        state = self.state
        return {
            "arm": self.arm,
            "text": state.text,
            "tokens": state.tokens,
            "generated_tokens": len(state.tokens),
            "kv_bytes": {
                "measured": state.kv_bytes,
                "planned": state.planned_bytes,
                "full": state.full_bytes,
            },
            "prefill_seconds": round(state.prefill_seconds, 4),
            "decode_seconds": round(state.decode_seconds, 4),
            "tokens_per_second": round(state.speed, 2),
            "layer_compressions": state.layer_compressions,
            "parts_from_full_at": self.parts_at,
        }


def generate_all(
    model: Any, tokenizer: Any, watch: Callable[[str, Progress], None]
) -> Iterator[Result]:
    """Generate with every arm, the full cache first; Ctrl-C ends an arm's text early.

    Args:
        model: not attached to anything.
        tokenizer: turns tokens into text.
        watch: is called with the arm and its state after every token.
    """
    prompt = encode_messages(tokenizer, [{"role": "user", "content": PROBLEM}])
    full: list[int] | None = None
    for name in ARMS:

        def told(state: Progress, _: str, name: str = name) -> None:
            watch(name, state)

        arm = parse_arm(name)
        config = None if arm is None else CompressionConfig(BUDGET, arm, INTERVAL)
        state = watched(model, tokenizer, prompt, Sampling(NEW_TOKENS), config, told)
        yield Result(name, state, None if full is None else _parting(full, state.tokens))
        full = full or state.tokens


def _parting(full: Sequence[int], tokens: Sequence[int]) -> int | None:
    for index, (a, b) in enumerate(zip(full, tokens, strict=False)):
        if a != b:
            return index
    return None if len(full) == len(tokens) else min(len(full), len(tokens))


def report_data(results: Sequence[Result]) -> dict[str, Any]:
    """Everything for ``--json``."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "problem": PROBLEM,
        "budget": BUDGET,
        "interval": INTERVAL,
        "prompt_tokens": results[0].state.prompt_tokens,
        "results": [result.data() for result in results],
        "remark": HONEST,
    }


def comparison(results: Sequence[Result]) -> tuple[Table, list[str]]:
    """Return the table of all arms and the lines below it."""
    rows = []
    for result in results:
        state = result.state
        compressed = state.config is not None
        rows.append(
            (
                result.arm,
                str(len(state.tokens)),
                str(result.same_tokens) if compressed else "-",
                human(state.kv_bytes),
                human(state.planned_bytes),
                human(state.full_bytes),
                str(state.layer_compressions) if compressed else "-",
                f"{state.speed:.1f}",
            )
        )
    titles = ("arm", "tokens", "as full", "KV", "planned", "full cache", "events", "tok/s")
    title = f"Budget {BUDGET}, compressed every {INTERVAL} tokens, greedy, fp32"
    exact = all(result.state.kv_bytes == result.state.planned_bytes for result in results)
    return Table(title, [(name, index > 0) for index, name in enumerate(titles)], rows), [
        f"\nMeasured KV bytes {'equal' if exact else 'DIFFER FROM'} the plan to the byte. As full: "
        "tokens before the text parts from the full cache's. Events: compressions of a layer.",
        HONEST,
    ]
