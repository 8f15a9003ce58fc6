"""ReasonAlloc as a model of the lm-evaluation-harness: ``reasonalloc lm-eval``.

Importing this module registers the model ``reasonalloc`` with lm-eval (extra ``lm-eval``), which
does not look for the entry points of other packages.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from reasonalloc.errors import CompressionNeverHappened, UsageError
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.integrations.lm_eval_arguments import (
    SETTINGS,
    check_adapter,
    check_gguf,
    check_loaders,
    check_names,
    explained,
    gguf_device,
    model_source,
    read_config,
)
from reasonalloc.loading import load_model
from reasonalloc.texts import Trajectory

_LOG = logging.getLogger(__name__)
#: A request of lm-eval: its texts (or None), tokens of the context and of the continuation.
Request = tuple[Any, list[int], list[int]]


@register_model("reasonalloc")
class ReasonAllocLM(HFLM):  # type: ignore[misc]
    """lm-eval's model ``hf`` under a KV budget.

    ``generate_until`` runs under the budget in batches. ``loglikelihood`` and
    ``loglikelihood_rolling`` run under it as well, one request at a time: the context is the
    prompt, the continuation is replayed exactly as it would have been decoded. The first token of
    a continuation is predicted by the whole context, so choices of one token show no effect.

    Args:
        pretrained: hub name, folder, ``.gguf`` file, or a loaded model.
        budget: mean tokens kept per (layer, KV head); needed unless ``arm`` is ``full``.
        arm: preset or ``policy/layers/heads``.
        interval, window, n_sink, prompt, pin_turns, pin_limit, pin_overflow, protect_prompt, seed,
            profile, attention, step: as of ``CompressionConfig``, with its defaults; ``step`` has
            an effect on generations only.
        options: everything that lm-eval's ``hf`` takes. Of a PEFT adapter's model, the base model
            inside gets the budget.

    Raises:
        UsageError: a wrong setting.
        UnsupportedError: a model that cannot work under a budget.
    """

    def __init__(
        self, pretrained: Any = None, budget: int | None = None, arm: str = "rkv", **options: Any
    ) -> None:
        if pretrained is None:
            raise UsageError("model_args: no model: add pretrained=MODEL")
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        check_names(options)
        self.kv_config = read_config(arm, budget, settings)
        self.kv_compressions = 0
        if self.kv_config is not None:
            check_loaders(options)
        source = model_source(pretrained, options) if isinstance(pretrained, str) else None
        with explained():
            if source is not None and source.kind == "gguf":
                self._load_gguf(source.name, options)
            else:
                super().__init__(pretrained=pretrained, **options)
        if self.kv_config is not None:
            check_adapter(self.model, options.get("peft"))
            with attach_config(self._inner, self.kv_config):
                pass  # what cannot work is refused before any data is read

    def _load_gguf(self, name: str, options: dict[str, Any]) -> None:
        check_gguf(name, options)
        options["device"] = gguf_device(options.get("device"))
        model, tokenizer = load_model(
            name,
            options.pop("dtype", "auto"),
            options["device"],
            options.get("trust_remote_code", False),
        )
        options["tokenizer"] = options.get("tokenizer") or tokenizer
        super().__init__(pretrained=model, **options)
        self.pretrained = name

    @property
    def _inner(self) -> Any:
        """The transformers model, which gets the budget: inside of a PEFT adapter's, its base."""
        find = getattr(self.model, "get_base_model", None)
        return self.model if find is None else find()

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Complete a batch [batch, tokens], left-padded; one cache per call."""
        if self.kv_config is None:
            return super()._model_generate(context, *args, **kwargs)  # type: ignore[no-any-return]
        with warnings.catch_warnings(), attach_config(self._inner, self.kv_config) as attached:
            warnings.simplefilter("ignore", CompressionNeverHappened)  # said once, at the end
            output: Tensor = super()._model_generate(context, *args, **kwargs)
            if attached.recorder is not None:
                self.kv_compressions += attached.recorder.compressions
        return output

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval; says if nothing was ever compressed."""
        before = self.kv_compressions
        output: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._say(before, len(requests))
        return output

    def _say(self, before: int, requests: int) -> None:
        if self.kv_config is None:
            return
        events = self.kv_compressions - before
        if events:
            _LOG.info("%d layer compressions in %d requests", events, requests)
        else:
            _LOG.warning(
                "the cache was never compressed in %d requests: no sequence exceeded the budget of "
                "%d at a boundary, so the results are those of the full cache",
                requests,
                self.kv_config.budget,
            )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.kv_config is None:
            output: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return output
        before, answers = self.kv_compressions, []
        with torch.inference_mode(), attach_config(self._inner, self.kv_config) as attached:
            for texts, context, continuation in tqdm(requests, disable=disable_tqdm):
                if not continuation:
                    raise UsageError("a task asks for the likelihood of an empty continuation")
                room = max(1, self.max_length + 1 - len(continuation))
                trajectory = Trajectory(tuple(context[-room:]), tuple(continuation))
                cache = attached.new_cache()
                with cache.replaying():
                    pieces = replay_logits(self.model, trajectory, cache)
                    answers.append(_score(pieces, continuation))
                self.kv_compressions += cache.recorder.compressions
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        self._say(before, len(requests))
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own, and what the cache was held to: it goes into the result file."""
        info: dict[str, Any] = super().get_model_info()
        config = self.kv_config
        info["kv_arm"] = "full" if config is None else str(config.arm)
        if config is not None:
            info["kv_budget"], info["kv_interval"] = config.budget, config.interval
            info["kv_step"], info["kv_attention"] = config.step, config.attention
            info["kv_prompt"] = config.prompt
            info["kv_compressions"] = self.kv_compressions
        return info


def _score(pieces: Any, continuation: list[int]) -> tuple[float, bool]:
    """Summed log-likelihood in nats, and whether every token is the most likely one."""
    total, greedy, start = 0.0, True, 0
    for logits in pieces:
        targets = torch.tensor(
            continuation[start : start + len(logits)], dtype=torch.int64, device=logits.device
        )
        scores = logits.float().log_softmax(-1)
        total += float(scores.gather(1, targets[:, None]).sum())
        greedy = greedy and bool((scores.argmax(-1) == targets).all())
        start += len(logits)
    return total, greedy
