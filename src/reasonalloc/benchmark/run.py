"""Several contenders on one model, taking turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.benchmark.decode import Contender, Timing, decode, weight_products
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf import attach_config


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        model: a transformers model without a budget.
        contenders: caches to compare.
        prompt: tokens of the (random) prompts.
        new_tokens: decode steps of a run.
        interval: further steps, in which the parts of a step are timed.
        repeats: runs per contender.
    """

    model: Any
    contenders: Sequence[Contender]
    prompt: int
    new_tokens: int
    interval: int
    repeats: int = 1

    def check(self) -> None:
        """Refuse what cannot run before anything is measured.

        Raises:
            UsageError: more tokens than the model has positions, or a setting that cannot work.
            UnsupportedError: a model that cannot run under a budget.
        """
        for contender in self.contenders:
            if contender.config is not None:
                with attach_config(self.model, contender.config):
                    pass
        tokens = self.prompt + max(self.new_tokens, self.interval + 1) + self.interval
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise UsageError(
                f"prompt, new_tokens and one more interval are {tokens} tokens, the model has "
                f"{limit} positions: give fewer --new-tokens"
            )

    def measure(
        self,
        batch: int,
        entry: dict[str, Any],
        watch: Callable[[str, int], None] = lambda text, steps: None,
    ) -> None:
        """Measure all contenders at a batch size.

        Args:
            batch: sequences.
            entry: its ``runs`` and ``weight_products`` (seconds) grow as runs are finished.
            watch: called with what is running and the steps that it has done.
        """
        ids = self._prompts(batch)
        for contender in self.contenders:  # warm-up, past a compression
            with contextlib.suppress(torch.OutOfMemoryError):
                decode(self.model, contender, ids, self.interval + 1, 1)
        for repeat in range(self.repeats):
            entry["weight_products"].extend(weight_products(self.model, batch))
            first = repeat % len(self.contenders)  # nobody always comes first
            for contender in [*self.contenders[first:], *self.contenders[:first]]:
                text = f"batch {batch}, {contender.name}, run {repeat + 1} of {self.repeats}"
                watch(text, 0)
                entry["runs"].append(self._run(contender, ids, watch, text))
        entry["weight_products"].extend(weight_products(self.model, batch))

    def _run(
        self, contender: Contender, ids: Tensor, watch: Callable[[str, int], None], text: str
    ) -> dict[str, Any]:
        try:
            timing = decode(
                self.model,
                contender,
                ids,
                self.new_tokens,
                self.interval,
                lambda steps: watch(text, steps),
            )
        except torch.OutOfMemoryError:
            return {"arm": contender.name, "out_of_memory": True}
        return _row(contender, timing)

    def _prompts(self, batch: int) -> Tensor:
        """Return random token ids, [batch, prompt] int64."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (batch, self.prompt), generator=generator, device="cpu")
        return ids.to(self.model.device)


def _row(contender: Contender, timing: Timing) -> dict[str, Any]:
    split = timing.split
    # Of a replayed step, attention is not a part that could be timed.
    whole = contender.config is not None and contender.config.step in ("graph", "compile")
    return {
        "arm": contender.name,
        "prefill_seconds": timing.prefill_seconds,
        "steps": [round(s, 7) for s in timing.steps],
        "attention": None if whole else split.attention / split.total,
        "compression": split.compression / split.total,
        "rest": split.rest / split.total,
        "kv_bytes": timing.kv_bytes,
        "peak_bytes": timing.peak_bytes,
    }
