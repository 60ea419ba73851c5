"""Runs a study and writes its result: one JSON and one picture."""

import dataclasses
import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from memformer.lab.plots import add_legend
from memformer.lab.runs import repeat_rows, train_runs, trained_table, training_seconds
from memformer.lab.study import Result, Row, Study, Table, Verdict
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun, load_run
from memformer.training.metrics import format_table, log, model_name, replace_file

__all__ = ["read_result", "run_study", "save_figure", "write_result"]


def run_study(
    study: Study,
    folders: Sequence[str] = (),
    *,
    out: str,
    quick: bool = False,
    runs_folder: str = os.path.join("runs", "lab"),
) -> Result:
    """Trains or reads the runs of a study, measures, and writes <out>/<name>.json and .png.

    Args:
      study: what to run.
      folders: of finished runs, for a study that reads them.
      out: folder of the results.
      quick: the small version; it is not judged.
      runs_folder: a study trains its runs in <runs_folder>/<name>, on data in <runs_folder>/<name>-data.

    Raises:
      RunError: folders that the study does not need, or none where it needs them, or no quick version.
    """
    if study.reads and not folders:
        raise RunError(f"{study.name} measures finished runs: name the folders of {study.reads} (see docs/results.md).")
    if folders and not study.reads:
        raise RunError(f"{study.name} needs no runs, got {', '.join(folders)}.")
    if quick and study.quick is None:
        raise RunError(f"{study.name} measures the runs it is given; it has no quick version.")
    started, earlier = time.monotonic(), 0.0
    small = study.quick if quick else None
    settings = {**study.settings, **(small.settings if small else {})}
    runs = {os.path.basename(os.path.normpath(folder)): load_run(folder) for folder in folders}
    given = list(runs.values())
    if study.rows:
        rows, changes = (small.rows, small.changes) if small else (repeat_rows(study.rows, study.seeds), {})
        folder = os.path.join(runs_folder, f"{study.name}-quick" if quick else study.name)
        if quick:
            shutil.rmtree(f"{folder}-data", ignore_errors=True)
        data = {} if study.prepare is None else study.prepare(f"{folder}-data", settings)
        runs, earlier = train_runs(folder, rows, base={**study.base, **data}, changes=changes, fresh=quick)
    result = study.measure(runs, settings)
    if study.rows:
        result = dataclasses.replace(result, tables=[*result.tables, trained_table(runs)])
    verdict = None if quick else study.judge(result)
    write_result(study, result, verdict, given, out=out, seconds=time.monotonic() - started + earlier)
    if study.examples is not None:
        for label, figure in study.examples(runs).items():
            path = os.path.join(given[0].folder, f"{study.name}-{label}.png")
            add_legend(figure)
            figure.savefig(path, dpi=120)
            log(f"written: {path}")
    return result


def write_result(
    study: Study, result: Result, verdict: Verdict | None, runs: Sequence[LoadedRun], *, out: str, seconds: float
) -> str:
    """Prints the tables, writes the picture and the JSON, and returns the JSON's path.

    Args:
      study: the study.
      result: its measurements.
      verdict: its judgement; None for a quick run.
      runs: those it was given, for the record.
      out: folder of the results.
      seconds: that the measurement took, training included.
    """
    for title, rows in result.tables:
        log(f"\n{title}")
        log(format_table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows]))
    os.makedirs(out, exist_ok=True)
    content = {
        "name": study.name,
        "verdict": None if verdict is None else verdict._asdict(),
        "runs": [_describe(run) for run in runs],
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "tables": [{"title": title, "rows": rows} for title, rows in result.tables],
        "values": result.values,
    }
    path = os.path.join(out, f"{study.name}.json")
    with replace_file(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    save_figure(study, read_result(content), out)
    log(f"\nclaim:   {study.claim}")
    if verdict is not None:
        log(f"verdict: {verdict.kind}. {verdict.finding}")
    log(f"written: {path}")
    return path


def read_result(content: Mapping[str, Any]) -> Result:
    """The result in a study's JSON."""
    tables = [Table(table["title"], table["rows"]) for table in json.loads(json.dumps(content["tables"]))]
    return Result(tables, json.loads(json.dumps(content["values"])))


def save_figure(study: Study, result: Result, out: str) -> None:
    """Draws the study's figure as <out>/<name>.png."""
    figure = study.draw(result)
    add_legend(figure)
    figure.savefig(os.path.join(out, f"{study.name}.png"), dpi=120, metadata={"Software": None})


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe(run: LoadedRun) -> Row:
    """The identity of a run, without a path of this machine."""
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
    installed = {}
    for name in ("jax", "flax", "memformer"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed, "device": jax.devices()[0].device_kind}
