"""What fidelity results say: means with intervals, by position and by kind of token."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from reasonalloc.config import preset_name
from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.evaluation.kv_share import (
    SIZES,
    Reference,
    budget_name,
    kv_summary,
    make_reference,
    share_text,
)
from reasonalloc.evaluation.result import Result, budget_figure
from reasonalloc.tables import Table
from reasonalloc.texts import Trajectory

POSITIONS = 8
#: The share of a text's tokens that ``kl_worst`` looks at.
WORST = 0.01
#: What is said of end-of-turn tokens.
ENDS = ("end_tokens", "end_nll", "end_kl")


@dataclass(frozen=True)
class FidelityResult(Result):
    """How far each arm moves the model's predictions on known texts.

    Attributes:
        model: its name.
        texts: what was replayed.
        jobs: (arm, budget) in the order of the table; ratios are to the first arm.
        interval: generated tokens between two compressions.
        measured: rows of these texts and jobs, and perhaps of others that ``out`` held.
        tokenizer: says of which kind a token is; None: nothing does.
        ends: token ids that end a turn.
    """

    model: str
    texts: tuple[Trajectory, ...]
    jobs: tuple[tuple[str, int | str], ...]
    interval: int
    measured: tuple[dict[str, Any], ...] = field(repr=False)
    tokenizer: Any = field(repr=False)
    ends: frozenset[int] = frozenset()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One entry per text, arm and budget.

        Fields: ``trajectory`` (fingerprint of the text), ``arm``, ``budget``; per predicted token
        ``kl`` (nats), ``agree``, ``added_nll`` (nats); ``kv_bytes``, ``full_bytes``,
        ``compressions`` (of layers), ``files``; ``budget_tokens``, ``compressed_kv_bytes``,
        ``full_16bit_kv_bytes``, ``end_tokens``, ``end_nll``, ``end_kl`` (see ``summary``).
        """
        at = {(row["trajectory"], row["arm"], row["budget"]): row for row in self.measured}
        return [
            at[text.key, arm, budget] | _at_ends([at[text.key, arm, budget]], [own])
            for arm, budget in self.jobs
            for text, own in zip(self.texts, self._places, strict=True)
        ]

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """One entry per arm and budget, over all texts.

        Means are per predicted token; intervals are 95 %, from a bootstrap over texts. The ratio
        to the first arm of the same budget is paired: both arms of a draw see the same texts.

        Fields: ``arm``, ``budget``, ``trajectories``, ``tokens``, ``kl`` (nats), ``top1``,
        ``added_nll`` (nats), each with ``..._interval`` [low, high]; ``kl_worst``: mean KL of the
        1 % of each text's tokens where it is largest; ``kl_ratio_to_first``,
        ``kl_worst_ratio_to_first``,
        ``kl_by_position``, ``kl_by_kind``, ``kv_bytes``, ``full_bytes``, ``compressions``;
        ``end_tokens`` (end-of-turn tokens of all completions), ``end_nll`` and ``end_kl`` (means of
        added NLL and KL there, nats; None without any) and ``end_nll_interval``;
        ``budget_tokens`` (mean per layer and KV head), ``compressed_kv_bytes`` (mean per sequence
        right after a compression), ``kv_share`` (these bytes by those of ``reference``).
        """
        count, first, words = len(self.texts), self.jobs[0][0], self.tokenizer
        parts = {job: self.rows[i * count : (i + 1) * count] for i, job in enumerate(self.jobs)}
        return [
            {
                "arm": arm,
                "budget": budget,
                **_line(own, parts[first, budget]),
                **_at_ends(own, self._places),
                "end_nll_interval": _end_interval(own),
                "kl_by_position": _by_position(own),
                "kl_by_kind": {} if words is None else _by_kind(own, self.texts, words),
                "kv_bytes": max(row["kv_bytes"] for row in own),
                "full_bytes": max(row["full_bytes"] for row in own),
                "compressions": sum(row["compressions"] for row in own),
                **kv_summary(own, self.reference),
            }
            for (arm, budget), own in parts.items()
        ]

    @cached_property
    def reference(self) -> Reference | None:
        """The full cache that is 100 %: in 16 bits, at the mean final length of the texts."""
        lengths = (len(text.prompt_ids) + len(text.completion_ids) - 1 for text in self.texts)
        sizes = (row.get("full_16bit_kv_bytes") for row in self.rows[: len(self.texts)])
        return make_reference(zip(sizes, lengths, strict=True), "mean length of the texts")

    def tables(self) -> list[Table]:
        """See ``Result``."""
        titles = ["budget", "arm", "KL", "95 %", "ratio", "worst 1 %", "top-1", "NLL"]
        titles += ["end NLL", "KV share"] if any(self._places) else ["KV share"]
        heading = (
            f"Per token, {len(self.texts)} trajectories, compressed every {self.interval} tokens"
        )
        columns = [(title, title != "arm") for title in titles]
        return [Table(heading, columns, [_cells(item) for item in self.summary])]

    @cached_property
    def _places(self) -> list[list[int]]:
        """Per text, where predicted tokens end a turn."""
        targets = [text.completion_ids[1:] for text in self.texts]
        return [[i for i, token in enumerate(own) if token in self.ends] for own in targets]

    def frame_rows(self) -> list[dict[str, Any]]:
        """Return means per predicted token of every text, arm and budget."""
        return [
            {
                "trajectory": row["trajectory"],
                "arm": row["arm"],
                "budget": row["budget"],
                "tokens": len(row["kl"]),
                "kl": sum(row["kl"]) / len(row["kl"]),
                "kl_worst": statistics.mean(_largest(row)),
                "top1": sum(row["agree"]) / len(row["agree"]),
                "added_nll": sum(row["added_nll"]) / len(row["added_nll"]),
                "kv_bytes": row["kv_bytes"],
                "full_bytes": row["full_bytes"],
                "compressions": row["compressions"],
                **{name: row.get(name) for name in (*ENDS, *SIZES)},
            }
            for row in self.rows
        ]

    def plot(self, axis: str = "bytes") -> Any:
        """Return a figure of plotly: KL divergence against KV bytes or tokens, with 95 % intervals.

        Args:
            axis: ``bytes``, right after a compression, as % of ``reference``; or ``tokens``.

        Raises:
            UsageError: another axis, or plotly is not installed.
        """
        named = [item | {"arm": preset_name(item["arm"])} for item in self.summary]
        share = None if self.reference is None else self.reference.title
        title = "KL(full || compressed), nats"
        return budget_figure(named, "kl", "kl_interval", title, axis, share, log=True)

    def notes(self) -> list[str]:
        """Return the lines below the table."""
        lines = [
            f"{preset_name(item['arm'])} at budget {item['budget']}: never compressed, texts fit."
            for item in self.summary
            if not item["compressions"]
        ]
        ends = sum(map(len, self._places))
        few = ", which says little with so few." if len(self.texts) < 10 else "."
        return [
            *lines,
            "KL(full || compressed) in nats; ratio: of the first arm's KL, paired; worst 1 %: mean "
            "KL of the 1 % of each text's tokens where it is largest; NLL: added. "
            f"Intervals: 95 %, bootstrap over trajectories{few}",
            *([f"end NLL: at the {ends} end-of-turn tokens of the texts."] if ends else []),
            *([] if self.reference is None else [f"KV share: {self.reference.title}."]),
        ]


def kind(text: str) -> str:
    """Kind of a token: ``number``, ``word``, ``space`` or ``symbol``."""
    core = text.strip()
    if not core:
        return "space"
    if any(c.isdigit() for c in core):
        return "number"
    return "word" if any(c.isalpha() for c in core) else "symbol"


def _line(own: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of an arm's rows, one per text; ``base`` are those of the first arm."""
    tokens = [float(len(row["kl"])) for row in own]
    sums = [sum(row["kl"]) for row in own]
    worst = [_largest(row) for row in own]
    worst_sums, worst_tokens = [*map(sum, worst)], [float(len(values)) for values in worst]
    return {
        "trajectories": len(own),
        "tokens": int(sum(tokens)),
        "kl": sum(sums) / sum(tokens),
        "kl_interval": bootstrap_ratio(sums, tokens),
        "kl_ratio_to_first": _ratio(sums, [sum(row["kl"]) for row in base]),
        "kl_worst": sum(worst_sums) / sum(worst_tokens),
        "kl_worst_interval": bootstrap_ratio(worst_sums, worst_tokens),
        "kl_worst_ratio_to_first": _ratio(worst_sums, [sum(_largest(row)) for row in base]),
        "top1": sum(sum(row["agree"]) for row in own) / sum(tokens),
        "top1_interval": bootstrap_ratio([float(sum(r["agree"])) for r in own], tokens),
        "added_nll": sum(sum(row["added_nll"]) for row in own) / sum(tokens),
        "added_nll_interval": bootstrap_ratio([sum(r["added_nll"]) for r in own], tokens),
    }


def _largest(row: dict[str, Any]) -> list[float]:
    """The share ``WORST`` of a text's KL values, the largest ones."""
    return sorted(row["kl"])[-math.ceil(WORST * len(row["kl"])) :]


def _ratio(sums: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Ratio of an arm's sums per text to those of the first arm, paired."""
    least = [max(value, 1e-12) for value in base]
    low, high = bootstrap_ratio(list(sums), least)
    return {"value": sum(sums) / sum(least), "low": low, "high": high}


def _at_ends(rows: Sequence[dict[str, Any]], places: Sequence[list[int]]) -> dict[str, Any]:
    """Means of an arm's rows at their end-of-turn tokens, see ``ENDS``."""

    def mean(name: str) -> float | None:
        pairs = zip(rows, places, strict=True)
        values = [row[name][place] for row, own in pairs for place in own]
        return sum(values) / len(values) if values else None

    values = sum(map(len, places)), mean("added_nll"), mean("kl")
    return dict(zip(ENDS, values, strict=True))


def _end_interval(rows: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """95 % interval of ``end_nll``, over the texts that have ends."""
    own = [row for row in rows if row["end_tokens"]]
    counts = [float(row["end_tokens"]) for row in own]
    sums = [row["end_nll"] * row["end_tokens"] for row in own]
    return bootstrap_ratio(sums, counts) if own else None


def _cells(item: dict[str, Any]) -> tuple[str, ...]:
    low, high = item["kl_interval"]
    ratio = item["kl_ratio_to_first"]
    return (
        budget_name(item),
        preset_name(item["arm"]),
        f"{item['kl']:.4f}",
        f"{low:.4f}-{high:.4f}",
        f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        f"{item['kl_worst']:.3f}",
        f"{item['top1']:.3f}",
        f"{item['added_nll']:+.3f}",
        *([] if item["end_nll"] is None else [f"{item['end_nll']:+.3f}"]),
        share_text(item["kv_share"]),
    )


def _by_position(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Mean KL in equal parts of the completions, from their beginning to their end."""
    parts: list[list[float]] = [[] for _ in range(POSITIONS)]
    for row in rows:
        for index, value in enumerate(row["kl"]):
            parts[index * POSITIONS // len(row["kl"])].append(value)
    return [sum(part) / len(part) if part else None for part in parts]


def _by_kind(
    rows: Sequence[dict[str, Any]], trajectories: Sequence[Trajectory], tokenizer: Any
) -> dict[str, dict[str, float]]:
    """Mean KL by the kind of the token that had to be predicted, with the number of tokens."""
    kinds: dict[str, list[float]] = {}
    for row, trajectory in zip(rows, trajectories, strict=True):
        for token, value in zip(trajectory.completion_ids[1:], row["kl"], strict=True):
            kinds.setdefault(kind(tokenizer.decode([token])), []).append(value)
    return {
        name: {"kl": sum(values) / len(values), "tokens": len(values)}
        for name, values in sorted(kinds.items())
    }
