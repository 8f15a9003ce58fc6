"""A self-test: a tiny random model, compressed against full."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from reasonalloc.errors import CompressionNeverHappened

if TYPE_CHECKING:
    from reasonalloc.config import Step

_PROMPT, _NEW = 24, 40


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what was tried, in a few words.
        passed: whether it held.
        detail: numbers, or the error.
    """

    name: str
    passed: bool
    detail: str


def self_test(backend: str, device: str) -> list[Check]:
    """Check that a large budget equals the full cache and a small one compresses as planned."""
    from reasonalloc.loading import quiet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for one another
    try:
        with quiet(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore", CompressionNeverHappened)
            model = _model().to(device)
            prompt = torch.randint(2, 97, (2, _PROMPT), device="cpu").to(device)
            return [_equals_full(model, prompt, backend), _compresses(model, prompt, backend)]
    except Exception as error:  # the point is to report whatever does not work here
        return [Check("runs", False, f"{type(error).__name__}: {error}")]
    finally:
        torch.set_num_threads(threads)


def step_test(step: str, device: str) -> list[Check]:
    """Check that steps of a kind give the tokens of plain ones.

    Raises:
        UsageError, UnsupportedError: they cannot run here.
    """
    from reasonalloc import attach
    from reasonalloc.loading import quiet

    name = "the tokens of plain steps"
    with quiet(), torch.random.fork_rng():
        model = _model().to(device)
        prompt = torch.randint(2, 97, (2, _PROMPT), device="cpu").to(device)
        texts = []
        for kind in ("eager", step):
            with attach(model, budget=16, interval=8, step=cast("Step", kind)):
                try:
                    texts.append(_tokens(model, prompt).sequences)
                except Exception as error:  # the point is to report whatever does not work here
                    return [Check(name, False, f"{type(error).__name__}: {error}")]
    differ = int((texts[0] != texts[1]).sum())
    detail = f"{differ} tokens differ" if differ else f"{texts[0].numel()} tokens alike"
    return [Check(name, not differ, detail)]


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _tokens(model: Any, prompt: torch.Tensor, **keywords: Any) -> Any:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        **keywords,
    )


def _equals_full(model: Any, prompt: torch.Tensor, backend: str) -> Check:
    from reasonalloc import attach

    full = _tokens(model, prompt).sequences
    with attach(model, budget=_PROMPT + _NEW, interval=16, attention=backend):
        budgeted = _tokens(model, prompt).sequences
    same = torch.equal(full, budgeted)
    return Check(
        "a budget above the length equals the full cache",
        same,
        f"{full.numel()} tokens alike"
        if same
        else f"{int((full != budgeted).sum())} tokens differ",
    )


def _compresses(model: Any, prompt: torch.Tensor, backend: str) -> Check:
    from reasonalloc import attach
    from reasonalloc.integrations.hf.versions import with_cache

    name = "a small budget compresses and takes the planned bytes"
    arm = "rkv/uniform/reasonalloc"
    with attach(model, budget=16, interval=8, arm=arm, attention=backend) as attachment:
        cache = attachment.new_cache()
        _tokens(model, prompt, **with_cache({}, cache))
        planned = attachment.plan(int(prompt.shape[0])).kv_bytes(cache.get_seq_length())
    events = cache.recorder.compressions
    detail = f"{events} layer compressions, {cache.kv_bytes} bytes, planned {planned}"
    return Check(name, events > 0 and cache.kv_bytes == planned, detail)
