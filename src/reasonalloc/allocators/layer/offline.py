"""What layer allocators share that divide by calibrated statistics."""

from __future__ import annotations

from torch import Tensor

from reasonalloc.allocators.layer.base import LayerQuery
from reasonalloc.allocators.rounding import shares_of
from reasonalloc.calibrated.statistics import Statistics, load_statistics
from reasonalloc.errors import UsageError


def statistics_of(name: str, path: str, query: LayerQuery) -> Statistics:
    """Return the statistics file of allocator ``name``, made for the query's model.

    Raises:
        UsageError: no path, or a file that is missing, broken or of another model.
    """
    if not path:
        raise UsageError(
            f"layers={name!r} needs a statistics file: pass profile='FILE.safetensors' "
            "(--profile FILE.safetensors), made for this model with "
            "'reasonalloc calibrate --objective statistics'"
        )
    statistics = load_statistics(path)
    statistics.check_model(query.model_id, query.config_hash, query.layers)
    return statistics


def in_proportion(preference: Tensor, query: LayerQuery) -> list[int]:
    """Return windows for all, the rest in proportion to ``preference`` [layers], with an exact sum.

    Every layer keeps at least the sinks and one token more per head besides its window, if the
    budget has room for that.
    """
    windows = [heads * query.window for heads in query.heads]
    free = query.total - sum(windows)
    each = query.budget - query.window
    least = [min(heads * (query.n_sink + 1), heads * each) for heads in query.heads]
    given = shares_of(preference, free, least, free, exponent=1.0)
    return [own + window for own, window in zip(given, windows, strict=True)]
