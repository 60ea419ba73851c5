"""The Neural Turing Machine beside an LSTM: how fast each learns, how far it generalises, where the heads stand."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from memformer.lab.study import Study, new_figure, training_records, training_seconds
from memformer.tasks.ntm import Copy, DynamicNGrams, optimal_bits
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["measure"]

# In the order of the paper's section 4; the second is what a length counts.
TASKS = {
    "copy": "vectors",
    "repeat_copy": "vectors",
    "associative_recall": "items",
    "dynamic_ngrams": "bits",
    "priority_sort": "vectors",
}

# Model to colour and marker, in the order of legends.
STYLES = {
    "NTM, LSTM controller": (COLOURS[0], "o"),
    "NTM, feedforward controller": (COLOURS[2], "^"),
    "LSTM": (COLOURS[1], "s"),
}

# Wrong bits a sequence, below which a task counts as learnt (arXiv 1807.08518).
LEARNT = 0.1

# Vectors of the copy whose heads are shown; fewer where the memory has no room for them.
SHOWN = 100


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Tables and plots of runs on the tasks of arXiv 1410.5401, NTM and LSTM, one or more of each.

    Raises:
      RunError: a run that has not ended, or is of another task or model.
    """
    for run in runs:
        _check(run)
    named = [(task, _name(run), run) for task in TASKS for run in runs if run.task.name == task]
    study.claim = (
        "An NTM learns to copy in fewer sequences than an LSTM and goes on copying at lengths it was not trained on, "
        "where the LSTM fails; on 6-grams it comes near the optimal predictor (1410.5401, section 4)."
    )
    rows = [_row(task, name, run) for task, name, run in named]
    study.add_table("Bits a sequence after training, test split, at the lengths of training", rows)
    optimum = _add_optimum(study, [run for task, _, run in named if task == "dynamic_ngrams"])
    lengths = [part for task, name, run in named for part in _by_length(task, name, run)]
    if lengths:
        study.add_table("Bits and wrong bits a sequence by length, beyond training", lengths)
    _draw_learning(study, named, optimum)
    _draw_lengths(study, lengths, {task: run.task.length for task, _, run in named})
    traced = [run for task, name, run in named if task == "copy" and name != "LSTM"]
    if traced:
        _draw_heads(study, traced[0])
    study.outcome = _outcome(rows, lengths, optimum)


def _check(run: LoadedRun) -> None:
    kind = run.config["model"].get("type")
    if run.task.name not in TASKS or kind not in ("ntm", "recurrent_lm"):
        raise RunError(
            f"{run.folder} must be a run of model ntm or recurrent_lm on one of {', '.join(TASKS)}, got {kind} on "
            f"{run.task.name}."
        )
    if run.result is None or not run.result["finished"]:
        raise RunError(f"{run.folder} has not ended; give train.py the same command to go on with it.")


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    if model["type"] == "recurrent_lm":
        return model["cell"].upper()
    return f"NTM, {'LSTM' if model['controller'] == 'lstm' else model['controller']} controller"


def _scores(run: LoadedRun, length: int) -> dict[str, float]:
    return (run.result or {})["lengths"][str(length)]


def _row(task: str, name: str, run: LoadedRun) -> dict[str, Any]:
    scores = _scores(run, run.task.length)
    return {
        "task": task,
        "model": name,
        "parameters": run.model.size(),
        "sequences": run.step * run.config["train"]["batch_size"],
        "bits a sequence": round(scores["bits_per_sequence"], 3),
        "wrong bits a sequence": round(scores["bit_errors"], 4) if "bit_errors" in scores else "",
        "seconds": round(training_seconds(run)),
    }


def _by_length(task: str, name: str, run: LoadedRun) -> list[dict[str, Any]]:
    """Scores at single lengths; that of training is a mixture where lengths vary."""
    result: dict[str, Any] = run.result or {}
    if len(result["lengths"]) < 2:
        return []
    return [
        {
            "task": task,
            "model": name,
            "length": int(length),
            "bits a sequence": float(f"{scores['bits_per_sequence']:.4g}"),
            "wrong bits a sequence": float(f"{scores['bit_errors']:.4g}"),
        }
        for length, scores in result["lengths"].items()
        if int(length) != run.task.length
    ]


def _add_optimum(study: Study, runs: Sequence[LoadedRun]) -> float | None:
    """Bits of the optimal predictor on the very sequences that the first of the runs was scored on."""
    if not runs:
        return None
    config = runs[0].config
    count = config["train"]["final_batches"] * config["train"]["batch_size"]
    source = runs[0].task.source("test", config["seed"])
    costs = []
    for number in range(count):
        one = source[number]
        sequence = np.append(one["inputs"][:, 0], one["targets"][-1, 0])
        costs.append(optimal_bits(sequence, runs[0].task.context if isinstance(runs[0].task, DynamicNGrams) else 5))
    optimum = float(np.mean(costs))
    study.values["optimal bits of dynamic n-grams"] = {"sequences": count, "bits": round(optimum, 2)}
    return optimum


def _draw_learning(study: Study, named: Sequence[tuple[str, str, LoadedRun]], optimum: float | None) -> None:
    tasks = [task for task in TASKS if any(task == other for other, _, _ in named)]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = new_figure(rows, columns, width=max(5.5, 3.2 * columns), height=0.6 + 2.9 * rows)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for other, name, run in named:
            if other == task:
                size = run.config["train"]["batch_size"]
                points = [(r["step"] * size / 1e3, r["bits_per_sequence"]) for r in training_records(run)]
                axis.plot(*zip(*points, strict=True), color=STYLES[name][0], linewidth=1.3)
        asked = next(run.task for other, _, run in named if other == task)
        if task == "dynamic_ngrams" and optimum is not None:
            _mark(axis, optimum, f"optimal predictor, {optimum:.1f}")
        else:
            axis.set_ylim(bottom=0)
        if isinstance(asked, Copy):
            _mark(axis, asked.guessing_bits, "guessing")
        axis.set_title(task.replace("_", " "), fontsize=11)
        axis.set_xlabel("sequences seen (thousands)")
    for axis in axes[:, 0]:
        axis.set_ylabel("bits a sequence (training)")
    _legend(figure, {name for _, name, _ in named})
    caption = (
        "Cost a sequence against sequences seen. Claim: the NTM reaches zero (on n-grams: the optimum) long before "
    )
    study.save_figure(figure, "learning", caption + "the LSTM.")


def _mark(axis: Any, height: float, text: str) -> None:
    axis.axhline(height, color="0.4", linestyle=":")
    where = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
    axis.annotate(text, (0.98, height), ha="right", va="bottom", fontsize=8, color="0.35", **where)


def _draw_lengths(study: Study, rows: Sequence[dict[str, Any]], trained: dict[str, int]) -> None:
    tasks = [task for task in ("copy", "associative_recall") if any(row["task"] == task for row in rows)]
    if not tasks:
        return
    figure, axes = new_figure(1, len(tasks), width=max(5.5, 4.2 * len(tasks)), height=3.6)
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, (colour, marker) in STYLES.items():
            points = [(r["length"], r["bits a sequence"]) for r in rows if (r["task"], r["model"]) == (task, name)]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=colour, markersize=4, label=name)
        axis.axvspan(0, trained[task], color="0.92", zorder=0)
        axis.annotate("trained", (trained[task] / 2, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top",
                      fontsize=8, color="0.35")  # fmt: skip
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, max(2.0, axis.get_ylim()[1]))
        axis.set_xlim(left=0)
        axis.set_title(task.replace("_", " "))
        axis.set_xlabel(f"length ({TASKS[task]})")
    axes[0, 0].set_ylabel("bits a sequence")
    _legend(figure, {row["model"] for row in rows if row["task"] in tasks})
    study.save_figure(
        figure,
        "lengths",
        "Cost a sequence by length, linear below 1 bit, logarithmic above. Claim: beyond the lengths of training the "
        "NTM goes on, the LSTM fails.",
    )


def _legend(figure: Any, names: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=m, label=n) for n, (colour, m) in STYLES.items() if n in names]
    columns = len(handles) if figure.get_figwidth() > 7 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _draw_heads(study: Study, run: LoadedRun) -> None:
    """The paper's figure 6: what goes in and out, what is written and read, and where."""
    model: Any = run.module()
    length = min(SHOWN, run.config["model"]["slots"] - 4)
    task = run.task.with_length(length)
    one = task.source("test", run.config["seed"])[0]
    trace = jax.device_get(jax.jit(model.trace)(one["inputs"][None]))
    outputs = 1 / (1 + np.exp(-trace.logits[0]))
    panels = (
        (("inputs", one["inputs"]), ("outputs (probability of 1)", outputs)),
        (("adds", trace.adds[0, :, 0]), ("reads", trace.reads[0, :, 0])),
        (("write weights", trace.write_weights[0, :, 0]), ("read weights", trace.read_weights[0, :, 0])),
    )
    figure, axes = new_figure(3, 2, width=9.0, height=6.4)
    for row, (pair, label) in enumerate(zip(panels, ("channel", "entry of a slot", "slot"), strict=True)):
        for column, (title, values) in enumerate(pair):
            axis = axes[row, column]
            first = 0 if column == 0 else length + 1
            part = values[first : first + length + 1 - column].T
            extent = (first - 0.5, first + part.shape[1] - 0.5, -0.5, len(part) - 0.5)
            shown = axis.imshow(
                part, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest", extent=extent
            )
            figure.colorbar(shown, ax=axis, pad=0.01)
            axis.set_title(title, fontsize=10)
            if column == 0:
                axis.set_ylabel(label)
    for axis in axes[2]:
        axis.set_xlabel("time step")
    errors = int(((outputs[length + 1 :] > 0.5) != (one["targets"][length + 1 :] > 0.5)).sum())
    study.values["wrong bits of the copy shown"] = {"length": length, "errors": errors}
    study.save_figure(
        figure,
        "heads",
        f"A copy of {length} vectors by the {_name(run)} ({errors} wrong bits of {length * task.num_classes}), trained "
        f"on at most {run.task.length}: as it listens (left) and as it answers (right). Claim: it writes one vector a "
        "slot, moving by one, and reads the same slots in the same order.",
    )


def _outcome(rows: Sequence[dict[str, Any]], lengths: Sequence[dict[str, Any]], optimum: float | None) -> str:
    def list_(chosen: Sequence[dict[str, Any]], score: str) -> str:
        return ", ".join(f"{row[score]:.3g} ({row['model']})" for row in chosen)

    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        name, own = task.replace("_", " "), [row for row in rows if row["task"] == task]
        if task == "dynamic_ngrams":
            parts.append(f"{name} {list_(own, 'bits a sequence')} bits against {optimum:.1f} of the optimum")
            continue
        parts.append(f"{name} {list_(own, 'wrong bits a sequence')}")
        far = max((row["length"] for row in lengths if row["task"] == task), default=0)
        beyond = [row for row in lengths if row["task"] == task and row["length"] == far]
        if beyond:
            parts[-1] += f", at {far} {TASKS[task]} {list_(beyond, 'wrong bits a sequence')}"
    unlearnt = [
        f"{row['task'].replace('_', ' ')} ({row['model']})"
        for row in rows
        if row["task"] != "dynamic_ngrams" and row["wrong bits a sequence"] > LEARNT
    ]
    return f"Wrong bits a sequence: {'; '.join(parts)}. Not learnt in these runs: {', '.join(unlearnt) or 'none'}."
