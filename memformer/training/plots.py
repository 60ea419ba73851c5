"""Plots of a run: learning curve, and accuracy by length. Matplotlib is imported on first use."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from memformer.training.files import write_bytes

__all__ = ["COLOURS", "plot_learning_curve", "plot_lengths", "plot_positions"]

# Okabe and Ito's palette, safe for color-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def _axes(count: int, width: float = 7.0) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: no global state, no window system
    figure = Figure(figsize=(width, 3.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_bytes(path, content.getvalue())


def plot_learning_curve(
    records: Sequence[Mapping[str, Any]], path: str, *, title: str, chance: float | None = None
) -> None:
    """Plots loss and accuracy (if the run has it) of training and evaluation against steps.

    Args:
      records: records of metrics.jsonl.
      path: PNG file to write.
      title: title of the plot.
      chance: accuracy of a constant guess, drawn dotted.
    """
    names = [n for n in ("loss", "accuracy") if any(n in r for r in records)]
    if not names:
        return
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        for kind, label, style in (("train", "training", "-"), ("eval", "held out", "o--")):
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]
            if points:
                colour = COLOURS[0] if kind == "train" else COLOURS[1]
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.4)
        axis.set_ylabel("loss (nats)" if name == "loss" else name)
        if name == "accuracy":
            axis.set_ylim(0, 1.02)
            if chance is not None:
                axis.axhline(chance, color="0.4", linestyle=":", label="constant guess")
        elif any(r.get("loss") for r in records):
            axis.set_yscale("log")
        _mark_lengths(axis, records, labelled=axis is axes[0])
    # the last panel has every line; curves leave no corner free, so the legend is outside
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    _save(figure, path)


def _mark_lengths(axis: Any, records: Sequence[Mapping[str, Any]], *, labelled: bool) -> None:
    """Marks the steps at which a curriculum changed the length."""
    trained = [record for record in records if record["kind"] == "train"]
    for before, after in zip(trained, trained[1:], strict=False):
        if before.get("length") != after.get("length"):
            axis.axvline(before["step"], color="0.6", linewidth=0.8)
            if labelled:
                axis.annotate(
                    f"length {after['length']}",
                    (before["step"], 0.95),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 0),
                    textcoords="offset points",
                    fontsize=8,
                    color="0.35",
                    rotation=90,
                    va="top",
                )


def plot_lengths(
    results: Mapping[str, Mapping[int, float]],
    path: str,
    *,
    title: str,
    chance: Mapping[int, float] | None = None,
    trained: Sequence[int] = (),
) -> None:
    """Plots accuracy against length, one line per model.

    Args:
      results: label -> length -> accuracy.
      path: PNG file to write.
      title: title of the plot.
      chance: length -> accuracy of the best constant guess.
      trained: shortest and longest length of training, shaded.
    """
    figure, (axis,) = _axes(1)
    if trained:
        axis.axvspan(min(trained) * 0.93, max(trained) * 1.07, color="0.9", label="trained on", linewidth=0)
    for index, (label, points) in enumerate(results.items()):
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(list(points), list(points.values()), "o-", color=colour, label=label, linewidth=1.6)
    if chance:
        axis.plot(list(chance), list(chance.values()), ":", color="0.4", label="constant guess")
    lengths = sorted({n for points in results.values() for n in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("length")
    axis.set_ylabel("accuracy")
    axis.set_title(title)
    axis.legend(frameon=False)
    _save(figure, path)


def plot_positions(
    results: Mapping[str, Mapping[int, float]],
    path: str,
    *,
    title: str,
    trained: int,
    axis_title: str = "tokens of context",
) -> None:
    """Plots perplexity against numbers of tokens, one line per model.

    Args:
      results: label -> most tokens in a range -> perplexity; 0 tokens stand at 1/2, as "none".
      path: PNG file to write.
      title: title of the plot.
      trained: length of the examples in training, marked by a line.
      axis_title: what the tokens are.
    """
    figure, (axis,) = _axes(1)
    for index, (label, points) in enumerate(results.items()):
        places = [n or 0.5 for n in points]
        axis.plot(places, list(points.values()), "o-", color=COLOURS[index % len(COLOURS)], label=label)
    axis.axvline(trained, color="0.4", linestyle=":", label="length of training")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")
    numbers = sorted({n for points in results.values() for n in points})
    axis.set_xticks([n or 0.5 for n in numbers], [str(n or "none") for n in numbers])
    axis.xaxis.minorticks_off()
    axis.set_xlabel(axis_title)
    axis.set_ylabel("perplexity")
    axis.set_title(title)
    axis.legend(frameon=False)
    _save(figure, path)
