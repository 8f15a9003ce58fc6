"""Which model families of the installed transformers run under a KV budget: tries toys."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reasonalloc.diagnose.toys import VALID, text_default, toy_config
from reasonalloc.errors import NothingToBudget, ReasonAllocError, UsageError, unknown_name
from reasonalloc.planning.inline import layer_types as own_types
from reasonalloc.planning.shapes import layer_shapes

Verdict = Literal["works", "refused", "nothing to budget", "fails", "not tried"]

PROMPT, NEW = 20, 40
MOST_PARAMETERS = 20_000_000
_TITLES: dict[Verdict, str] = {
    "works": "Works",
    "refused": "Refused",
    "fails": "Fails",
    "not tried": "Not tried: no toy could be made",
    "nothing to budget": "Nothing to budget: no decoder with causal attention, or a bounded cache",
}


@dataclass(frozen=True)
class Family:
    """A model family, tried.

    Attributes:
        name: ``model_type`` of its configurations.
        model: class of the model.
        verdict: ``works``: with a budget that evicts nothing a toy wrote the tokens of the full
            cache, and a small budget compressed; ``refused``: ``attach`` said why not; ``nothing to
            budget``: no decoder with causal attention, or a bounded cache; ``fails``: none of
            these; ``not tried``: no toy could be made.
        reason: what was said or seen; if it works: under which condition, or "".
        kinds: kinds of its layers, as transformers names them.
    """

    name: str
    model: str
    verdict: Verdict
    reason: str = ""
    kinds: tuple[str, ...] = ()


def share(families: Sequence[Family]) -> tuple[int, int]:
    """Return how many families work, and of how many: those with something to budget."""
    counted = [family for family in families if family.verdict != "nothing to budget"]
    return sum(family.verdict == "works" for family in counted), len(counted)


def family_names() -> list[str]:
    """Return the model types that the installed transformers can load as causal language models.

    Of a model with other parts, such as a vision tower, its text model alone if that has a name.
    """
    names = _mapping()
    return sorted(name for name in names if _is_listed(name, names))


def try_families(names: Sequence[str] = ()) -> Iterator[Family]:
    """Try families one after the other; a second or two each.

    Args:
        names: model types; none: all.

    Raises:
        UsageError: transformers has no such family, or its text model has a name of its own.
    """
    known = _mapping()
    for name in names:
        if name not in known:
            raise unknown_name("family", name, family_names())
        if not _is_listed(name, known):
            text = text_default(name).model_type
            raise UsageError(f"family {name!r} has more parts than its text model: give {text!r}")
    for name in names or family_names():
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield try_family(name)


def try_family(name: str) -> Family:
    """Build a toy of a family, attach a budget and compare it with the full cache."""
    from reasonalloc.loading import quiet

    with quiet():
        family = _try(name)
        if "bounded already" not in family.reason:
            return family
        without = _try(name, sliding_window=None)
    if without.verdict != "works":
        return family
    return dataclasses.replace(without, reason="if its sliding_window is None")


def _try(name: str, **settings: Any) -> Family:
    family = Family(name, _mapping()[name], "not tried")
    try:
        if _is_encoder_decoder(name):
            reason = "an encoder-decoder family"
            return dataclasses.replace(family, verdict="nothing to budget", reason=reason)
        config = toy_config(name, **settings)
        family = dataclasses.replace(family, kinds=_kinds(config))
        model = _built(family.model, config)
    except Exception as error:  # whatever a family's code says to sizes that it does not expect
        said = {"reason": _line(error), **_refusal(name, family.model)}
        return dataclasses.replace(family, **said)
    try:
        verdict, reason = _compare(model)
    except NothingToBudget as error:
        verdict, reason = "nothing to budget", _line(error)
    except ReasonAllocError as error:
        verdict, reason = "refused", _line(error)
    except Exception as error:
        verdict, reason = "fails", _line(error)
    return dataclasses.replace(family, verdict=verdict, reason=reason)


def as_page(families: Sequence[Family], transformers_version: str) -> str:
    """Return the page ``docs/models.md``: a table of what works, and one of the rest."""
    works, counted = share(families)
    lines = [
        "# Models",
        "",
        f"`reasonalloc models --page docs/models.md` wrote this page with transformers "
        f"{transformers_version}: {works} of {counted} text model families with something to "
        "budget work. Each family is tried as a toy with random weights: a budget that holds "
        "everything must give the tokens of the full cache, and a small one must compress.",
        "",
    ]
    for verdict, title in _TITLES.items():
        chosen = [family for family in families if family.verdict == verdict]
        if chosen:
            lines += [f"## {title} ({len(chosen)})", "", *_rows(chosen, verdict == "works"), ""]
    return "\n".join(lines)


def _rows(families: Sequence[Family], works: bool) -> list[str]:
    title = "layers" if works else "why"
    lines = [f"| family | class | {title} |", "|---|---|---|"]
    for family in families:
        kinds = f"{', '.join(family.kinds)} {family.reason}".strip()
        last = kinds if works else family.reason.replace("|", "\\|")
        lines.append(f"| `{family.name}` | `{family.model}` | {last} |")
    return lines


def _refusal(name: str, model: str) -> dict[str, Any]:
    """Return why a family is refused by its class or its default configuration; else nothing."""
    from reasonalloc.integrations.hf.model import check_cached

    try:
        layer_shapes(text_default(name, **VALID.get(name, {})), model)
        check_cached(getattr(importlib.import_module("transformers"), model))
    except NothingToBudget as error:
        return {"verdict": "nothing to budget", "reason": _line(error)}
    except ReasonAllocError as error:
        return {"verdict": "refused", "reason": _line(error)}
    except Exception:  # it has no default
        return {}
    return {}


def _compare(model: Any) -> tuple[Verdict, str]:
    from reasonalloc import attach

    ids = torch.randint(2, 97, (1, PROMPT), device=model.device)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    small: dict[str, Any] = {"budget": 16, "interval": 8, "window": 4}
    with attach(model, **small):  # refused before it runs
        pass
    try:
        full = model.generate(ids, **how)
    except Exception as error:
        return "not tried", f"its toy does not generate: {_line(error)}"
    with attach(model, **small) as attached:
        compressed = model.generate(ids, **how)
        recorder = attached.recorder
        compressions = 0 if recorder is None else recorder.compressions
    with attach(model, **{**small, "budget": PROMPT + NEW}):
        whole = model.generate(ids, **how)
    if not torch.equal(whole, full):
        return "fails", "a budget that evicts nothing gives other tokens than the full cache"
    if compressed.shape != full.shape or not compressions:
        return "fails", "a small budget never compressed"
    return "works", ""


def _built(name: str, config: Any) -> Any:
    """Return a model with random weights.

    Raises:
        ValueError: it would be no toy; says how many parameters it would have.
    """
    kind: Any = getattr(importlib.import_module("transformers"), name)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its toy would have {size:,} parameters")
    torch.manual_seed(0)
    return kind(config).eval()


def _is_listed(name: str, names: Container[str]) -> bool:
    """Return whether a family is not that of a text model with a name of its own."""
    try:
        text = text_default(name).model_type
    except Exception:  # a family without a default configuration
        return True
    return text == name or text not in names


def _mapping() -> dict[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: dict[str, str | tuple[str, ...]] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {k: v if isinstance(v, str) else v[0] for k, v in names.items()}


def _is_encoder_decoder(name: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return bool(getattr(CONFIG_MAPPING[name](), "is_encoder_decoder", False))


def _kinds(config: Any) -> tuple[str, ...]:
    types = own_types(config) or getattr(config, "layer_types", None) or ["full_attention"]
    return tuple(dict.fromkeys(types))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ReasonAllocError):
        return text
    return f"{type(error).__name__}: {text[:300]}".removesuffix(": ")
