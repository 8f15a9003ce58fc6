"""What a watched generation did, as a table."""

from __future__ import annotations

from reasonalloc.integrations.hf.watch import Progress
from reasonalloc.tables import Table, human

_STOPPED = {"end": "", "length": ", stopped at --max-new-tokens", "interrupted": ", interrupted"}


def watch_table(result: Progress) -> Table:
    """Return tokens, speed and bytes of a finished generation."""
    rows = [
        ("prompt", f"{result.prompt_tokens} tokens, read in {result.prefill_seconds:.2f} s"),
        ("generated", f"{len(result.tokens)} tokens{_STOPPED[result.stopped]}"),
        ("speed", f"{result.speed:.1f} tok/s"),
        ("KV cache now", human(result.kv_bytes)),
        ("planned", f"{human(result.planned_bytes)}{_match(result)}"),
    ]
    title, config = "full", result.config
    if config is not None:
        rows.append(("full cache would take", f"{human(result.full_bytes)}{_saved(result)}"))
        rows.append(("compressions", _compressions(result, config.budget)))
        title = f"{config.arm}, budget {config.budget}, every {config.interval} tokens"
    return Table(title, [], rows)


def _match(result: Progress) -> str:
    if result.stopped == "interrupted":  # perhaps in the middle of a step, between two layers
        return ""
    same = result.planned_bytes == result.kv_bytes
    return " (exactly)" if same else " (differs: please report this)"


def _saved(result: Progress) -> str:
    saved = result.full_bytes - result.kv_bytes
    if saved > 0:
        return f" ({human(saved)} saved)"
    return (
        " (less: the compressed cache has its full size from the start and pays off once the text "
        "is longer than budget and interval together)"
    )


def _compressions(result: Progress, budget: int) -> str:
    if result.layer_compressions:
        return f"{result.layer_compressions} over {result.layers} layers"
    return (
        f"none: {result.cached_tokens} tokens never exceeded the budget of {budget} at a boundary, "
        "so the text is that of the full cache"
    )
