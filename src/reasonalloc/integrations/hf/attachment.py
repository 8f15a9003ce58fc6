"""``attach`` a KV budget to a transformers model, ``detach`` it again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, cast

import torch

from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadAllocator
from reasonalloc.allocators.layer import LayerAllocator
from reasonalloc.attention import choose_backend
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.config import (
    Arm,
    CompressionConfig,
    PinOverflow,
    Prompt,
    RecordLevel,
    Step,
    choose_arm,
)
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.shared import SharedCompressor
from reasonalloc.errors import (
    CompressionNeverHappened,
    OtherCadence,
    UnsupportedError,
    UsageError,
)
from reasonalloc.integrations.hf import attention
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.calls import CallCheck, CallEnd, StepOfCache
from reasonalloc.integrations.hf.chat import Chat
from reasonalloc.integrations.hf.distance import distance_stands
from reasonalloc.integrations.hf.generation import NOT_HERE, check_generate, check_result
from reasonalloc.integrations.hf.inline import inline_stands, set_attention
from reasonalloc.integrations.hf.installed import Installed
from reasonalloc.integrations.hf.latent import Unexpanded, check_latents, latent_modules
from reasonalloc.integrations.hf.model import check_model, decoder_of, inner_model
from reasonalloc.integrations.hf.own_cache import budget_class, own_class
from reasonalloc.integrations.hf.projection import output_metrics
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.integrations.hf.saved import load_cache, save_cache
from reasonalloc.integrations.hf.sharding import find_shard
from reasonalloc.integrations.hf.shift import give_shift, shift_holder
from reasonalloc.integrations.hf.step import StaticStep, check_hooks, check_step
from reasonalloc.integrations.hf.versions import warn_if_untested, with_cache
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.policies import Policy
from reasonalloc.whole import whole_number

_HANDLE = "_reasonalloc"


class Attachment:
    """A model with a KV budget. Use it as a context manager, or call ``detach``.

    Attributes:
        config: the settings.
        shapes: all layers of the model.
        totals: retained tokens per layer under a budget, all its KV heads together.
        planned: the same per KV head, [layers][kv_heads], if the arm plans them beforehand.
        formats: tokens and format of older ones per KV head, [layers][kv_heads], if the arm plans
            these as well.
        shard: which KV heads are in this process. The four above, and ``plan``, are of the whole
            model; the cache holds this process's part.
    """

    def __init__(self, model: Any, config: CompressionConfig) -> None:
        self.shapes = check_model(model)
        self.shard = find_shard(model, self.shapes)
        check_step(config.step, model, self.shapes, self.shard.size)
        check_latents(config.attention, model, self.shapes)
        distance_stands(model, self.shapes, config.attention)
        self._heads = HEAD_ALLOCATORS.create(config.arm.heads)
        self._backend = choose_backend(
            config.attention, model.device, model.dtype, compiled=config.step == "compile"
        )
        self._text_config = text_config(model)
        if self._text_config._attn_implementation == attention.IMPLEMENTATION:
            raise UsageError(
                "this model shares its configuration with a model that has a KV budget: give it a "
                "copy of the configuration, or detach the other one"
            )
        weak = weakref.ref(model)  # a plan that somebody keeps must not keep the model
        self._plan = BudgetPlan(
            config,
            self.shapes,
            self._text_config,
            model_name(model),
            load_rope=lambda: read_rope(weak()),
            load_output_metrics=lambda: output_metrics(weak()),
            dtype=model.dtype,
        )
        self.config = self._plan.config
        self.totals, self.planned = self._plan.totals, self._plan.planned
        self.formats = self._plan.formats
        self._policy = self._plan.policy_of(self.shard)
        if (note := self._plan.other_cadence) is not None:
            warnings.warn(note, OtherCadence, stacklevel=4)  # where attach() was called
        warn_if_untested(stacklevel=5)
        self._model: Any = model
        self._original = self._implementations(self._text_config._attn_implementation)
        self._holder = shift_holder(model)
        self._installed: Installed | None = None
        self._last: weakref.ref[BudgetCache] | None = None
        self.recorder: Recorder | None = None

    def plan(
        self, batch: int = 1, dtype: torch.dtype | None = None, prompt_tokens: int = 0
    ) -> MemoryPlan:
        """Return the exact bytes of a cache.

        Args:
            batch: sequences.
            dtype: of the cache; None: the model's.
            prompt_tokens: of the longest prompt, which ``prompt="pin"`` keeps besides the budget.
        """
        count = whole_number("batch", batch, 1)
        itemsize = (dtype or self._require_model().dtype).itemsize
        return self._plan.memory(count, itemsize, prompt_tokens)

    def totals_at(self, budget: int) -> tuple[int, ...]:
        """``totals`` as they would be under another budget."""
        return self._plan.totals_at(budget)

    @property
    def attached(self) -> bool:
        """Whether the model still runs under the budget."""
        return self._model is not None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self._require_model().device)

    def prefill(self, ids: torch.Tensor, cache: BudgetCache) -> None:
        """Read tokens into a cache, which may then be copied, saved or generated with.

        Args:
            ids: [batch, n] token ids that follow what the cache has seen, without padding.
            cache: see ``new_cache``.
        """
        model = self._require_model()
        keep = {}
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
            keep["logits_to_keep"] = 1
        with torch.no_grad():
            model(**with_cache(keep, cache), input_ids=ids, use_cache=True)

    @property
    def implementation(self) -> str:
        """The attention that the model's configuration names now."""
        return str(self._text_config._attn_implementation)

    def _implementations(self, name: str) -> str | dict[str, str]:
        """What ``set_attn_implementation`` takes to change the text model alone."""
        config = self._model.config
        if self._text_config is config:
            return name
        keys = [k for k in config.sub_configs if getattr(config, k, None) is self._text_config]
        return dict.fromkeys(keys, name)

    def new_cache(self) -> BudgetCache:
        """An empty cache, for ``generate(..., past_key_values=cache)`` or a plain forward call."""
        return self.cache_of(_compressor)

    def cache_of(self, make: Callable[..., LayerCompressor]) -> BudgetCache:
        """An empty cache.

        Args:
            make: returns what a layer under a budget is; gets the arguments of ``LayerCompressor``
                and ``readers``, how many layers of the model read it.
        """
        self._require_model()
        recorder = Recorder(self.config.record)
        parts = iter(self._plan.parts(self.shard))
        formats = iter(self._plan.formats_of(self.shard))
        layers: list[LayerCompressor | None] = []
        for index, shape in enumerate(self.shapes):
            if not shape.compressible:
                layers.append(None)
                continue
            total, planned = next(parts)
            settings = (
                index,
                total,
                self.config,
                self._policy,
                self._heads,
                self._backend,
                recorder,
                planned,
                next(formats),
            )
            layers.append(make(*settings, readers=1 + len(shape.readers)))
        shapes = tuple(self.shard.shape(shape) for shape in self.shapes)
        cache = budget_class(own_class(self._model))(layers, shapes, recorder, self)
        self._last, self.recorder = weakref.ref(cache), recorder
        return cache

    @contextmanager
    def decoding(self, cache: BudgetCache) -> Iterator[None]:
        """Inside, single new tokens are never padding, and steps run as ``config.step`` says."""
        model = self._require_model()
        self.check_own(cache)
        with cache.in_use(), cache.only_real_tokens():
            if self.config.step == "eager" or self._installed is None:
                yield
                return
            check_hooks(model, self.config.step)
            own = self._installed.forward
            cache.stepper = StaticStep(own, cache, self._model.device, self.config.step)
            try:
                yield
            finally:
                cache.stepper = None

    @property
    def cache(self) -> BudgetCache | None:
        """The cache of the latest ``generate`` call, while something still holds it."""
        return None if self._last is None else self._last()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate`` on a compressed cache; same arguments, same result."""
        model = self._require_model()
        cache = check_generate(model, self, args, kwargs)
        give_shift(self._holder, cache, kwargs)
        kwargs = with_cache(kwargs, cache)
        own = self._installed.own("generate") if self._installed else None
        own = own or functools.partial(type(model).generate, model)
        with self.decoding(cache):
            result = own(*args, **kwargs)
        check_result(result, cache)
        if cache.recorder.compressions == 0:
            warnings.warn(
                f"the cache was never compressed: {cache.get_seq_length()} tokens per sequence did "
                f"not exceed the budget of {self.config.budget} at any boundary "
                f"(every {self.config.interval} tokens), so this run equals the full cache",
                CompressionNeverHappened,
                stacklevel=2,
            )
        return result

    def detach(self) -> None:
        """Give the model its own attention and ``generate`` back; harmless when repeated."""
        model, self._model = self._model, None
        if model is None:
            return
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.remove()
        set_attention(model, self._original)

    def _install(self) -> None:
        attention.register()
        model = self._model
        inline = list(inline_stands(model))  # refuses
        set_attention(model, self._implementations(attention.IMPLEMENTATION))
        stands: dict[str, Any] = {_HANDLE: self, "generate": self.generate}
        for name, reason in NOT_HERE.items():
            if hasattr(type(model), name):
                stands[name] = functools.partial(_refuse, reason)
        if self.config.step != "eager":
            stands["forward"] = StepOfCache(model.forward)
        self._installed = Installed(model, stands, self._original)
        self._installed.check(model, CallCheck(self, inner=False, holder=self._holder))
        decoder = decoder_of(model)
        if decoder is not model:
            self._installed.check(decoder, CallCheck(self, inner=True))
        for layer, module in latent_modules(model, self.shapes).items():
            stand = Unexpanded(module, self.shapes[layer])
            self._installed.place(module, {"expand_kv": stand})
        for module, own in distance_stands(model, self.shapes, self.config.attention):
            self._installed.place(module, own)
        for part, attributes in inline:
            self._installed.place(part, attributes)
        ends = any(shape.state is not None or shape.readers for shape in self.shapes)
        if ends or self._holder is not None:
            self._installed.after(decoder, CallEnd(self._holder))

    def chat(self, tokenizer: Any, **settings: Any) -> Chat:
        """A conversation whose earlier thoughts are dropped, see ``Chat``.

        Args:
            tokenizer: of the model, with a chat template.
            settings: of every ``generate`` call.
        """
        return Chat(self, tokenizer, settings)

    def save_cache(self, cache: BudgetCache, path: str | os.PathLike[str]) -> None:
        """Write a cache, such as that of a prompt, to a safetensors file; see ``load_cache``.

        Raises:
            UsageError: a cache of another attachment, or one that a call left in the middle.
        """
        self.check_own(cache)
        save_cache(cache, Path(path), self._fingerprint())

    def load_cache(self, path: str | os.PathLike[str]) -> BudgetCache:
        """Read a cache that an attachment with the same model and settings has saved.

        Raises:
            UsageError: the file cannot be read, is broken, or belongs to another model or settings.
        """
        cache = self.new_cache()
        load_cache(cache, Path(path), self._fingerprint(), self._model.device)
        return cache

    def check_own(self, cache: BudgetCache) -> None:
        """Refuse a cache of another attachment.

        Raises:
            UsageError: says so.
        """
        if cache.owner is not self:
            if not cache.owner.attached:
                raise UsageError(
                    "this cache belongs to a KV budget that was detached: attach again and start "
                    "anew"
                )
            raise UsageError(
                "this cache was made under another attachment: budgets differ, so start anew"
            )

    def _fingerprint(self) -> dict[str, str]:
        """What must be equal for a saved cache to be used: setting to value."""
        fields = dataclasses.asdict(self.config)
        del fields["size"]  # the budget says it
        for unimportant in ("attention", "step", "record", "profile"):
            fields.pop(unimportant)
        newer = {"prompt": ("evict", "protect"), "pin_turns": (False,), "pin_limit": (None,)}
        newer |= {"pin_overflow": ("refuse",), "kv_dtype": ("auto",)}  # than the format
        for name, usual in newer.items():
            if fields[name] in usual:
                fields.pop(name)
        fields["arm"] = str(self.config.arm)
        return {
            "model": config_hash(self._text_config.to_dict()),
            "dtype": str(self._require_model().dtype),
            "totals": str(self.totals),
            "planned": str(self.planned),
            **({} if self._plan.formats is None else {"formats": str(self._plan.formats)}),
            "shard": str(self.shard),
            **{name: str(value) for name, value in fields.items()},
        }

    def _require_model(self) -> Any:
        if self._model is None:
            raise UsageError("this attachment was detached: call attach() again")
        return self._model

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refused: it belongs to one model."""
        raise UsageError("an attachment cannot be copied: call attach() on the other model")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: it belongs to one model."""
        raise UsageError("an attachment cannot be pickled: save the model, and attach() again")

    def __enter__(self) -> Attachment:
        self._require_model()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: Any,
    *,
    budget: int | str,
    arm: str | Arm | None = None,
    policy: str | Policy | type[Policy] | None = None,
    layers: str | LayerAllocator | type[LayerAllocator] | None = None,
    heads: str | HeadAllocator | type[HeadAllocator] | None = None,
    interval: int = 128,
    window: int = 8,
    n_sink: int = 0,
    prompt: Prompt = "evict",
    pin_turns: bool = False,
    pin_limit: int | None = None,
    pin_overflow: PinOverflow = "refuse",
    protect_prompt: bool = False,
    kv_dtype: str = "auto",
    seed: int = 0,
    profile: str | os.PathLike[str] | None = None,
    attention: str = "auto",
    step: Step = "eager",
    record: RecordLevel = "off",
) -> Attachment:
    """Put a KV budget on a transformers model; ``model.generate`` then works as before.

    Args:
        model: a decoder-only model from ``AutoModelForCausalLM``, or a PEFT model around one (the
            budget then belongs to the model inside).
        budget: mean retained tokens per (layer, KV head) right after a compression; or bytes of a
            sequence, as ``"64MiB"`` or ``"25%@8192"``, see ``CompressionConfig``.
        arm: a preset (``reasonalloc ls``), ``policy/layers/heads`` or an ``Arm``; instead of the
            next three.
        policy: which tokens stay (default ``rkv``): a name, ``"name(key=value)"``, an object or a
            class, also one of your own.
        layers: how many per layer (default ``uniform``), likewise.
        heads: how many per KV head (default ``uniform``), likewise.
        interval, window, n_sink, prompt, pin_turns, pin_limit, pin_overflow, protect_prompt,
            kv_dtype, seed, profile, attention, step, record: see ``CompressionConfig``.

    Returns:
        The attachment: a context manager with ``detach``, ``plan``, ``new_cache``, ``recorder``.

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: a model that cannot work, with the reason.
    """
    config = CompressionConfig(
        budget=cast("int", budget),
        arm=choose_arm(arm, policy, layers, heads),
        interval=interval,
        window=window,
        n_sink=n_sink,
        prompt=prompt,
        pin_turns=pin_turns,
        pin_limit=pin_limit,
        pin_overflow=pin_overflow,
        protect_prompt=protect_prompt,
        kv_dtype=kv_dtype,
        seed=seed,
        profile=profile,
        attention=attention,
        step=step,
        record=record,
    )
    return attach_config(model, config)


def _compressor(*settings: Any, readers: int) -> LayerCompressor:
    """One layer under a budget, which one or several layers of the model read."""
    if readers > 1:
        return SharedCompressor(*settings, readers=readers)
    return LayerCompressor(*settings)


def _refuse(reason: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(reason)


def attach_config(model: Any, config: CompressionConfig) -> Attachment:
    """``attach`` with settings that are put together already."""
    refuse_attached(model)
    model = inner_model(model)
    attachment = Attachment(model, config)
    attachment._install()
    return attachment


def refuse_attached(model: Any) -> None:
    """Refuse a model that has a KV budget.

    Raises:
        UsageError: it has.
    """
    if getattr(inner_model(model), "__dict__", {}).get(_HANDLE) is not None:
        raise UsageError("this model has a KV budget already: detach(model) first")


def detach(model: Any) -> None:
    """Remove the KV budget from a model, if it has one.

    Raises:
        UsageError: no model.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model={model!r} must be a transformers model")
    attachment = getattr(inner_model(model), "__dict__", {}).get(_HANDLE)
    if isinstance(attachment, Attachment):
        attachment.detach()
