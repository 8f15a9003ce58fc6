"""What results of measurements have in common: a table, pandas, a picture, a notebook's view."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.tables import Shown, Table


class Result(Shown, ABC):
    """Base of ``EvaluationResult`` and ``FidelityResult``."""

    @property
    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One entry per measurement."""

    @property
    @abstractmethod
    def summary(self) -> list[dict[str, Any]]:
        """One entry per arm and budget."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Return the table of ``summary``."""

    @abstractmethod
    def plot(self, axis: str = "bytes") -> Any:
        """Return a figure of plotly against ``bytes`` or ``tokens``."""

    def to_pandas(self) -> Any:
        """Return ``rows`` as a ``pandas.DataFrame``.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise UsageError("to_pandas() needs the package 'pandas': pip install pandas") from None
        return pandas.DataFrame(self.frame_rows())

    def frame_rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``to_pandas``, numbers and texts alone."""
        return self.rows

    def __str__(self) -> str:
        return self.table()


def budget_figure(
    summary: Sequence[dict[str, Any]],
    value: str,
    interval: str,
    title: str,
    axis: str,
    share: str | None,
    log: bool = False,
) -> Any:
    """Return a figure of plotly: a value of every arm against its bytes or tokens, with intervals.

    Args:
        summary: entries with ``arm``, ``budget`` (None: a level that is drawn dashed), what
            ``kv_summary`` returns, the value and its interval.
        value, interval: names of the two in each entry.
        title: of the vertical axis.
        axis: ``bytes``, or ``tokens``, which stands for it where bytes are not known.
        share: title of the axis of bytes.
        log: whether the vertical axis is logarithmic.

    Raises:
        UsageError: another axis, or plotly is not installed.
    """
    if axis not in ("bytes", "tokens"):
        raise unknown_name("axis", axis, ("bytes", "tokens"))
    try:
        from plotly import graph_objects
    except ModuleNotFoundError:
        raise UsageError("plot() needs plotly: pip install 'reasonalloc[report]'") from None
    figure = graph_objects.Figure()
    points = [item for item in summary if item["budget"] is not None]
    in_bytes = axis == "bytes" and all(item["kv_share"] is not None for item in points)
    places = [100 * item["kv_share"] if in_bytes else item["budget_tokens"] for item in points]
    placed = [item | {"x": x} for item, x in zip(points, places, strict=True)]
    for arm in dict.fromkeys(item["arm"] for item in placed):
        own = sorted((i for i in placed if i["arm"] == arm), key=lambda item: item["x"])
        figure.add_scatter(name=arm, **_trace(own, value, interval))
    for item in summary:
        if item["budget"] is None:
            figure.add_hline(y=item[value], line_dash="dash", annotation_text="full cache")
    figure.update_xaxes(title=share if in_bytes else "budget (tokens per layer and KV head)")
    figure.update_yaxes(title=title, type="log" if log else "linear")
    return figure


def _trace(points: Sequence[dict[str, Any]], value: str, interval: str) -> dict[str, Any]:
    """The line of one arm; the text of a point names its budget and its tokens."""
    above = [item[interval][1] - item[value] for item in points]
    below = [item[value] - item[interval][0] for item in points]
    return {
        "x": [item["x"] for item in points],
        "y": [item[value] for item in points],
        "text": [f"budget {i['budget']}: {i['budget_tokens']:.0f} tokens" for i in points],
        "mode": "lines+markers",
        "error_y": {"array": above, "arrayminus": below, "thickness": 1},
    }
