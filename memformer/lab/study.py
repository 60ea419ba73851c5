"""What a measurement leaves behind: a JSON, a CSV and pictures in a results folder."""

import csv
import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from memformer.training.evaluation import LoadedRun
from memformer.training.metrics import format_table, model_name, read_records, replace_file, say

__all__ = ["Study", "learning_curve", "legend_below", "new_figure", "seconds_in", "training_records"]
__all__ += ["training_seconds"]


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 3.4) -> tuple[Any, Any]:
    """A Matplotlib figure that no window system knows of, and its axes as an array [rows, columns].

    Args:
      rows: of panels.
      columns: of panels.
      width: of the figure in inches.
      height: of the figure in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure: Any, axis: Any, *, columns: int | None = None, fontsize: Any = None) -> None:
    """One legend for all panels, below them.

    Args:
      figure: as `new_figure` gives it.
      axis: the panel whose lines it names.
      columns: of the legend; None is one row.
      fontsize: as Matplotlib has it.
    """
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if columns is None else columns
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=fontsize)


@dataclasses.dataclass
class Study:
    """One measurement in the making; `finish` writes it.

    Attributes:
      name: of the measurement and of its files.
      folder: where they go.
      runs: folder of the runs that the measurement trains itself.
      claim: what literature or sense expects, one sentence.
      outcome: what came out beside it, one sentence made of measured numbers.
      values: numbers for the JSON.
      tables: (title, rows) as added.
      figures: (file, caption) as saved.
      earlier: seconds of training that runs of this measurement had behind them when it was started.
    """

    name: str
    folder: str
    runs: str = os.path.join("runs", "lab")
    claim: str = ""
    outcome: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    tables: list[tuple[str, list[dict[str, Any]]]] = dataclasses.field(default_factory=list)
    figures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    earlier: float = 0.0

    def add_table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds a table and prints it; the study's first one is also its CSV.

        Args:
          title: above the table.
          rows: column name to text or number; all rows have the columns of the first.

        Raises:
          ValueError: no rows, or rows of different columns.
        """
        if not rows or any(list(row) != list(rows[0]) for row in rows):
            raise ValueError(f"rows of {title!r} must be at least one, all with the same columns, got {list(rows)[:3]}")
        self.tables.append((title, [dict(row) for row in rows]))
        say(f"\n{title}")
        say(format_table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows]))

    def save_figure(self, figure: Any, label: str, caption: str) -> None:
        """Writes a Matplotlib figure as <name>-<label>.png and .svg.

        Args:
          figure: as `new_figure` makes them.
          label: tells the study's figures apart.
          caption: what is seen, with the claim that it tests.
        """
        import matplotlib

        os.makedirs(self.folder, exist_ok=True)
        stem = f"{self.name}-{label}"
        # without these two the same figure would be another file at each run
        with matplotlib.rc_context({"svg.hashsalt": stem}):
            figure.savefig(os.path.join(self.folder, f"{stem}.svg"), metadata={"Date": None})
        figure.savefig(os.path.join(self.folder, f"{stem}.png"), dpi=100)
        self.figures.append((f"{stem}.png", caption))

    def finish(self, runs: Sequence[LoadedRun], seconds: float) -> str:
        """Writes the JSON and the CSV, prints claim and outcome, and returns the JSON's path.

        Raises:
          ValueError: no claim, no outcome or no table.
        """
        for name in ("claim", "outcome", "tables"):
            if not getattr(self, name):
                raise ValueError(f"study {self.name!r} must set its {name} before it is finished, got none")
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"{self.name}.json")
        content = {
            "name": self.name,
            "claim": self.claim,
            "outcome": self.outcome,
            "runs": [_describe(run) for run in runs],
            "date": datetime.date.today().isoformat(),
            "seconds": round(seconds + self.earlier, 1),
            "versions": _versions(),
            "tables": [{"title": title, "rows": rows} for title, rows in self.tables],
            "figures": [{"file": file, "caption": caption} for file, caption in self.figures],
            "values": self.values,
        }
        with replace_file(path) as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        rows = self.tables[0][1]
        with replace_file(os.path.join(self.folder, f"{self.name}.csv")) as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        say(f"\nclaim:   {self.claim}\noutcome: {self.outcome}\nwritten: {path}")
        return path


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def training_records(run: LoadedRun) -> list[dict[str, Any]]:
    """What the run logged of its training steps, in order."""
    return _records(run.folder)


def _records(folder: str) -> list[dict[str, Any]]:
    records = read_records(os.path.join(folder, "metrics.jsonl"))
    return [record for record in records if record["kind"] == "train"]


def learning_curve(run: LoadedRun) -> tuple[list[int], list[float]]:
    """Steps, and the accuracy in training at each that has one."""
    records = [record for record in training_records(run) if record["accuracy"] is not None]
    return [record["step"] for record in records], [record["accuracy"] for record in records]


def training_seconds(run: LoadedRun) -> float:
    """Time in training steps, of all parts of a run that was resumed; compiling and evaluating are left out."""
    return seconds_in(run.folder)


def seconds_in(folder: str) -> float:
    """The same for the folder of a run, which need not have ended, nor begun."""
    seconds, before = 0.0, 0
    for record in _records(folder):
        seconds += (record["step"] - before) * (record["step_seconds"] or 0.0)
        before = record["step"]
    return seconds


def _describe(run: LoadedRun) -> dict[str, Any]:
    """Which run, without a path of this machine."""
    return {
        "folder": f"runs/{os.path.basename(os.path.normpath(run.folder))}",
        "task": run.task.name,
        "model": model_name(run.config["model"]),
        "parameters": run.model.size(),
        "seed": run.config["seed"],
        "step": run.step,
        "seconds": round(training_seconds(run), 1),
    }


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "memformer")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), **found, "device": jax.devices()[0].device_kind}


def _installed(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))
