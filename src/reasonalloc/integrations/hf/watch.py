"""One generation that is watched: text, tokens, times and bytes as they come."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from reasonalloc.config import CompressionConfig
from reasonalloc.errors import CompressionNeverHappened
from reasonalloc.integrations.hf.attachment import Attachment, attach_config
from reasonalloc.integrations.hf.model import end_tokens
from reasonalloc.integrations.hf.own_cache import full_bytes, full_cache
from reasonalloc.integrations.hf.versions import with_cache
from reasonalloc.loading import quiet
from reasonalloc.planning.memory import LayerShape, MemoryPlan
from reasonalloc.planning.shapes import layer_shapes, model_name, text_config
from reasonalloc.tables import human


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: upper bound of generated tokens.
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from.
        seed: of the sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return keywords of ``generate``: the model's own sampling defaults play no part."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


@dataclass
class Progress:
    """Where a generation stands; times in seconds, sizes in bytes.

    Attributes:
        config: the settings, None for the full cache.
        shapes: the model's layers.
        dtype: of the cache.
        prompt_tokens: length of the prompt.
        cache: what the model writes to.
        attachment: the model's budget, None for the full cache.
        tokens: generated so far.
        text: generated so far, without special tokens.
        prefill_seconds: until the first token.
        decode_seconds: from the first to the latest token.
        stopped: ``end`` (the model's end token), ``length``, ``interrupted``, or ``running``.
    """

    config: CompressionConfig | None
    shapes: Sequence[LayerShape]
    dtype: torch.dtype
    prompt_tokens: int
    cache: Any
    attachment: Attachment | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = "running"

    @property
    def speed(self) -> float:
        """Generated tokens per second, without the prefill."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def layers(self) -> int:
        """Layers that can have a budget."""
        return sum(shape.compressible for shape in self.shapes)

    @property
    def cached_tokens(self) -> int:
        """Tokens that went through the cache, evicted ones included."""
        return int(self.cache.get_seq_length())

    @property
    def kv_bytes(self) -> int:
        """Measured: bytes that keys and values hold now."""
        return full_bytes(self.cache) if self.config is None else int(self.cache.kv_bytes)

    @property
    def planned_bytes(self) -> int:
        """What the plan says that ``kv_bytes`` is."""
        if self.attachment is None:
            return self.full_bytes
        plan = self.attachment.plan(1, self.dtype, self.prompt_tokens)
        return plan.kv_bytes(self.cached_tokens)

    @property
    def full_bytes(self) -> int:
        """What the model's own full cache takes at this length."""
        plan = MemoryPlan(tuple(self.shapes), (), 1, 1, 1, self.dtype.itemsize)
        return plan.full_bytes(self.cached_tokens)

    @property
    def bookkeeping_bytes(self) -> int:
        """Measured: what the compressed cache holds besides keys and values."""
        return 0 if self.config is None else int(self.cache.bookkeeping_bytes)

    @property
    def layer_compressions(self) -> int:
        """Compressions, every layer counted."""
        return 0 if self.config is None else int(self.cache.recorder.compressions)

    def report(self) -> dict[str, Any]:
        """Return text, tokens, times in seconds and sizes in bytes as plain JSON values."""
        config = self.config
        return {
            "arm": str(config.arm) if config else "full",
            "budget": config.budget if config else None,
            "interval": config.interval if config else None,
            "window": config.window if config else None,
            "text": self.text,
            "tokens": self.tokens,
            "stopped": self.stopped,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": len(self.tokens),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "tokens_per_second": round(self.speed, 2),
            "cached_tokens": self.cached_tokens,
            "kv_bytes": {
                "now": self.kv_bytes,
                "planned": self.planned_bytes,
                "full": self.full_bytes,
                "saved": self.full_bytes - self.kv_bytes,
            },
            "bookkeeping_bytes": self.bookkeeping_bytes,
            "layers": self.layers,
            "layer_compressions": self.layer_compressions,
            "compressed": self.layer_compressions > 0,
        }

    def line(self) -> str:
        """Return the state in one line."""
        if not self.tokens:
            return f"reading the prompt ({self.prompt_tokens} tokens)"
        now, full = self.kv_bytes, self.full_bytes
        parts = [f"{len(self.tokens)} tokens", f"{self.speed:.1f} tok/s", f"KV {human(now)}"]
        if self.config is not None:
            parts.append(
                f"saves {human(full - now)} of {human(full)}"
                if full > now
                else f"a full cache holds {human(full)} so far"
            )
        return " | ".join(parts)


#: Called with the state and each new piece of text (it may be empty).
Watch = Callable[[Progress, str], None]


class _Meter(TextStreamer):
    """Passes tokens and text on while ``generate`` runs."""

    def __init__(self, tokenizer: Any, progress: Progress, watch: Watch) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._progress, self._watch = progress, watch
        self._start = self._first = time.perf_counter()
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then each token."""
        progress, now = self._progress, time.perf_counter()
        if self._prompt_seen:
            if not progress.tokens:
                self._first = now
                progress.prefill_seconds = now - self._start
            progress.tokens.extend(int(t) for t in value.flatten())
            progress.decode_seconds = now - self._first
        self._prompt_seen = True
        super().put(value)  # type: ignore[no-untyped-call]
        self._watch(progress, "")

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that later tokens do not change."""
        self._progress.text += text
        self._watch(self._progress, text)


def watched(
    model: Any,
    tokenizer: Any,
    prompt: torch.Tensor,
    sampling: Sampling,
    config: CompressionConfig | None,
    watch: Watch,
) -> Progress:
    """Generate for one prompt; Ctrl-C ends it early and is no error.

    Args:
        model: not attached to anything.
        tokenizer: turns tokens into text.
        prompt: [1, n] token ids.
        sampling: how tokens are chosen.
        config: the budget, None for the full cache.
        watch: see ``Watch``.
    """
    with contextlib.ExitStack() as stack:
        attachment = None if config is None else stack.enter_context(attach_config(model, config))
        cache = full_cache(model) if attachment is None else attachment.new_cache()
        shapes = layer_shapes(text_config(model), model_name(model))
        config = None if attachment is None else attachment.config  # a budget in bytes, in tokens
        progress = Progress(config, shapes, model.dtype, int(prompt.shape[1]), cache, attachment)
        _generate(model, _Meter(tokenizer, progress, watch), prompt.to(model.device), sampling)
    return progress


def _generate(model: Any, meter: _Meter, prompt: torch.Tensor, sampling: Sampling) -> None:
    progress = meter._progress
    set_seed(sampling.seed)
    meter._watch(progress, "")
    try:
        with warnings.catch_warnings(), quiet(), torch.inference_mode():
            warnings.simplefilter("ignore", CompressionNeverHappened)
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                **with_cache({}, progress.cache),
                streamer=meter,
                **sampling.arguments(),
            )
        full_length = len(progress.tokens) >= sampling.max_new_tokens
        ended = progress.tokens[-1:] and progress.tokens[-1] in end_tokens(model)
        progress.stopped = "length" if full_length and not ended else "end"
    except KeyboardInterrupt:
        meter.end()  # type: ignore[no-untyped-call]
        progress.stopped = "interrupted"
