"""What results of measurements have in common: a table, pandas, a picture, a notebook's view."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from reasonalloc.errors import UsageError
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
    def plot(self) -> Any:
        """Return a figure of plotly."""

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
    summary: Sequence[dict[str, Any]], value: str, interval: str, title: str, log: bool = False
) -> Any:
    """Return a figure of plotly: a value of every arm against the budget, with intervals.

    Args:
        summary: entries with ``arm``, ``budget`` (None: a level that is drawn dashed), the value
            and its interval.
        value, interval: names of the two in each entry.
        title: of the vertical axis.
        log: whether that axis is logarithmic.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ModuleNotFoundError:
        raise UsageError("plot() needs plotly: pip install 'reasonalloc[report]'") from None
    figure = graph_objects.Figure()
    for arm in dict.fromkeys(item["arm"] for item in summary if item["budget"] is not None):
        own = sorted((i for i in summary if i["arm"] == arm), key=lambda item: item["budget"])
        values = [item[value] for item in own]
        above = [item[interval][1] - item[value] for item in own]
        below = [item[value] - item[interval][0] for item in own]
        figure.add_scatter(
            x=[item["budget"] for item in own],
            y=values,
            name=arm,
            mode="lines+markers",
            error_y={"array": above, "arrayminus": below, "thickness": 1},
        )
    for item in summary:
        if item["budget"] is None:
            figure.add_hline(y=item[value], line_dash="dash", annotation_text="full cache")
    figure.update_xaxes(title="budget (tokens per layer and KV head)")
    figure.update_yaxes(title=title, type="log" if log else "linear")
    return figure
