"""One style for all figures: lines and bars in panels, one legend below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from memformer.training.plots import COLOURS

__all__ = ["DOTTED", "add_legend", "draw_bars", "draw_lines", "line_style", "new_figure", "plot_bars", "plot_lines"]

# Matplotlib keywords of what is compared with: theory, chance, the optimum.
DOTTED: Mapping[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.3}
MARKERS = "osD^vPXd"

# y of each x, or (y, low, high)
Points = Mapping[float, Any]


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
        if style["linestyle"] == ":" and style["color"] == DOTTED["color"]:
            style["marker"] = ""
        banded = all(isinstance(y, Sequence) for y in points.values())
        middle = [y[0] for y in points.values()] if banded else list(points.values())
        axis.plot(list(points), middle, label=label, **style)
        if banded and points:
            low, high = ([y[place] for y in points.values()] for place in (1, 2))
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


def draw_bars(axis: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, flat: bool = False) -> None:
    """A bar for each group and each of `series` ([groups] each).

    Args:
      axis: the panel.
      groups: names on the axis.
      series: label to one number per group.
      flat: horizontal bars, the first group on top: for long names.
    """
    thick = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * thick for place in range(len(groups))]
        draw = axis.barh if flat else axis.bar
        draw(places, values, thick, color=COLOURS[number], label=label if len(series) > 1 else None)
    _grid(axis, "x" if flat else "y")
    if flat:
        axis.set_yticks(range(len(groups)), groups)
        axis.invert_yaxis()
    else:
        axis.set_xticks(range(len(groups)), groups)


def plot_lines(
    panels: Mapping[str, Mapping[str, Points]],
    *,
    x: str,
    y: str,
    columns: int = 3,
    width: float = 3.6,
    chance: float | Mapping[str, float] | None = None,
    share: bool = False,
    **options: Any,
) -> Any:
    """A figure with a panel of lines for each title.

    Args:
      panels: title to label to points.
      x: label of all x axes.
      y: label of the y axes on the left.
      columns: the most panels in a row.
      width: of a panel in inches.
      chance: the score of guessing, dotted; by title where panels differ.
      share: y goes from 0 to 1.
      options: of `draw_lines`.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, width=max(6.0, width * columns), height=0.9 + 2.6 * rows)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        draw_lines(axis, series, **options)
        guess = chance.get(title) if isinstance(chance, Mapping) else chance
        if guess is not None:
            axis.axhline(guess, label="chance", **DOTTED)
        if share:
            axis.set_ylim(0, 1.04)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x)
    for axis in axes[:, 0]:
        axis.set_ylabel(y)
    return figure


def plot_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], *, x: str, chance: float | None = None
) -> Any:
    """A figure of horizontal bars.

    Args:
      groups: names of the bars.
      series: label to one number per group.
      x: label of the axis of the numbers.
      chance: the score of guessing, dotted.
    """
    figure, axes = new_figure(height=1.1 + (0.16 + 0.2 * len(series)) * len(groups))
    draw_bars(axes[0, 0], groups, series, flat=True)
    axes[0, 0].set_xlabel(x)
    if chance is not None:
        axes[0, 0].axvline(chance, label="chance", **DOTTED)
    return figure
