"""One style for all figures: lines and bars in panels, drawn or declared, one legend below them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memformer.lab.study import Result, Row, numbers_in
from memformer.training.plots import COLOURS

__all__ = ["DOTTED", "Bars", "Lines", "add_legend", "draw_bars", "draw_lines", "line_style", "new_figure", "point_in"]

# Matplotlib keywords of what is compared with: theory, chance, the optimum.
DOTTED: Mapping[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.3, "marker": ""}
MARKERS = "osD^vPXd"

# y of each x, or (y, low, high)
Points = Mapping[Any, Any]


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 3.6) -> tuple[Any, Any]:
    """A Matplotlib figure without a window system, and its axes as an array [rows, columns].

    Args:
      rows: number of panels.
      columns: number of panels.
      width: in inches.
      height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_legend(figure: Any) -> None:
    """One legend for all panels, below them, where any line has a label."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in named}
    if named:
        longest = max(map(len, named))
        columns = max(1, min(len(named), int(figure.get_figwidth() / (0.07 * longest + 0.5))))
        figure.legend(named.values(), named, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def line_style(index: int) -> dict[str, Any]:
    """Matplotlib keywords of the line at a place in the legend."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": "-" if index < len(COLOURS) else "--",
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def draw_lines(
    axis: Any,
    series: Mapping[str, Points],
    *,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    x_base: int | None = None,
    y_scale: str = "linear",
) -> None:
    """Lines with markers; bands where points have a low and a high value.

    Args:
      axis: the panel.
      series: label to points; points without a finite y are left out by Matplotlib.
      styles: Matplotlib keywords by label, over the defaults (a colour and a marker each).
      x_base: base of a logarithmic x axis, whose ticks are the points; None for a linear one.
      y_scale: "linear", "log" or "symlog" (linear below 1).
    """
    for index, (label, points) in enumerate(series.items()):
        style = {**line_style(index), **(styles or {}).get(label, {})}
        bands = [y if isinstance(y, Sequence) else (y, y, y) for y in points.values()]
        axis.plot(list(points), [y[0] for y in bands], label=label, **style)
        if any(isinstance(y, Sequence) for y in points.values()):
            low, high = ([y[place] for y in bands] for place in (1, 2))
            axis.fill_between(list(points), low, high, color=style["color"], alpha=0.15, linewidth=0)
    _grid(axis, "both")
    if x_base is not None:
        axis.set_xscale("log", base=x_base)
        ticks = sorted({x for points in series.values() for x in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    if y_scale != "linear":
        axis.set_yscale(y_scale, **({"linthresh": 1} if y_scale == "symlog" else {}))
    if y_scale == "symlog":
        axis.set_ylim(bottom=0)


def _grid(axis: Any, which: str) -> None:
    axis.grid(True, axis=which, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_bars(axis: Any, groups: Sequence[str], series: Mapping[str, Sequence[Any]], *, flat: bool = False) -> None:
    """A bar for each group and each of `series` ([groups] each); (y, low, high) draws a line from low to high over it.

    Args:
      axis: the panel.
      groups: names on the axis.
      series: label to one number, or (y, low, high), per group.
      flat: horizontal bars, the first group on top: for long names.
    """
    thick = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * thick for place in range(len(groups))]
        draw = axis.barh if flat else axis.bar
        points = [value if isinstance(value, Sequence) else (value,) * 3 for value in values]
        heights, low, high = zip(*points, strict=True)
        draw(places, heights, thick, color=COLOURS[number], label=label if len(series) > 1 else None)
        if low != high:
            # the lines in the direction of the bars
            lines = axis.hlines if flat else axis.vlines
            lines(places, low, high, color="black", linewidth=1)
    _grid(axis, "x" if flat else "y")
    if flat:
        axis.set_yticks(range(len(groups)), groups)
        axis.invert_yaxis()
    else:
        axis.set_xticks(range(len(groups)), groups)


@dataclasses.dataclass(frozen=True)
class Lines:
    """A figure of lines, declared by the columns of a result's table.

    Attributes:
      line: column with the label of a line.
      points: "{} letters", the columns of the points with x in place of {}; with `value`, the column of x.
      x: label of the x axes.
      y: label of the y axes on the left.
      value: column of y, where each row is one point.
      panel: column with the title of the panel, or row -> title; one panel without it.
      table: number of the table.
      keep: row -> whether it is drawn.
      level: a dotted horizontal line: its height, the column with it, or title -> height.
      level_label: its name.
      limits: of y; None as Matplotlib chooses.
      columns: the most panels in a row.
      width: of a panel in inches.
      options: keywords of `draw_lines`.
    """

    line: str
    points: str
    x: str
    y: str
    value: str = ""
    panel: str | Callable[[Row], str] = ""
    table: int = 0
    keep: Callable[[Row], bool] = lambda row: True
    level: float | str | Mapping[str, float] | None = None
    level_label: str = "chance"
    limits: tuple[float, float] | None = None
    columns: int = 3
    width: float = 3.6
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, result: Result) -> Any:
        """The figure of a result."""
        panels: dict[str, dict[str, dict[float, Any]]] = {}
        levels: dict[str, Any] = {}
        for row in filter(self.keep, result.rows(self.table)):
            title = self.panel(row) if callable(self.panel) else str(row.get(self.panel, "")).replace("_", " ")
            points = panels.setdefault(title, {}).setdefault(row[self.line], {})
            points |= {row[self.points]: row[self.value]} if self.value else _wide(row, self.points)
            level = self.level.get(title) if isinstance(self.level, Mapping) else self.level
            levels[title] = numbers_in(row[level])[0] if isinstance(level, str) else level
        return self._draw(panels, levels)

    def _draw(self, panels: Mapping[str, Mapping[str, Mapping[float, Any]]], levels: Mapping[str, Any]) -> Any:
        columns = min(self.columns, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = new_figure(rows, columns, width=max(6.0, self.width * columns), height=0.9 + 2.6 * rows)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
            drawn = {label: {x: point_in(y) for x, y in points.items()} for label, points in series.items()}
            draw_lines(axis, drawn, **self.options)
            if levels[title] is not None:
                axis.axhline(levels[title], label=self.level_label, **DOTTED)
            if self.limits is not None:
                axis.set_ylim(*self.limits)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(self.x)
        for axis in axes[:, 0]:
            axis.set_ylabel(self.y)
        return figure


def _wide(row: Row, points: str) -> dict[float, Any]:
    """x to cell of the columns named after `points`."""
    before, after = points.split("{}")
    found = {name.removeprefix(before).removesuffix(after): name for name in row if name.startswith(before)}
    return {float(x): row[name] for x, name in found.items() if name.endswith(after) and x.isdigit()}


def point_in(cell: Any) -> Any:
    """y, or (y, low, high) of a cell with three numbers."""
    numbers = numbers_in(cell)
    return numbers if len(numbers) == 3 else numbers[0] if numbers else math.nan


@dataclasses.dataclass(frozen=True)
class Bars:
    """A figure of bars, declared by the columns of a result's table.

    Attributes:
      index: columns that name a group of bars.
      columns: of the numbers, a bar each.
      label: of the axis of the numbers.
      table: number of the table.
      keep: row -> whether it is drawn.
      flat: horizontal bars, for long names.
      joint: between the names of a group.
    """

    index: Sequence[str]
    columns: Sequence[str]
    label: str
    table: int = 0
    keep: Callable[[Row], bool] = lambda row: True
    flat: bool = True
    joint: str = ", "

    def __call__(self, result: Result) -> Any:
        """The figure of a result."""
        rows = list(filter(self.keep, result.rows(self.table)))
        groups = [self.joint.join(str(row[name]) for name in self.index) for row in rows]
        series = {name: [point_in(row[name]) for row in rows] for name in self.columns}
        figure, axes = new_figure(height=1.1 + (0.16 + 0.2 * len(series)) * len(groups) if self.flat else 3.6)
        draw_bars(axes[0, 0], groups, series, flat=self.flat)
        if self.flat:
            axes[0, 0].set_xlabel(self.label)
        else:
            axes[0, 0].set_xlabel(self.joint.join(self.index))
            axes[0, 0].set_ylabel(self.label)
        return figure
