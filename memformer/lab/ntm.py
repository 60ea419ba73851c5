"""The Neural Turing Machine beside an LSTM: cost after training, generalisation to longer sequences, its heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memformer.lab.plots import Lines, new_figure
from memformer.lab.runs import training_seconds
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict
from memformer.tasks.ntm import DynamicNGrams, optimal_bits
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["NTM"]

# In the order of the paper's section 4.
TASKS = ("copy", "repeat_copy", "associative_recall", "dynamic_ngrams", "priority_sort")
STYLES = {
    "NTM, LSTM controller": {"color": COLOURS[0], "marker": "o"},
    "NTM, feedforward controller": {"color": COLOURS[2], "marker": "^"},
    "LSTM": {"color": COLOURS[1], "marker": "s"},
}
# Wrong bits per sequence below which a task counts as learnt (arXiv 1807.08518).
LEARNT = 0.1
# Vectors of the copy whose heads are drawn; fewer where the memory has no room for them.
SHOWN = 100


def _measure(runs: Runs, settings: Settings) -> Result:
    """Scores of runs on the tasks of arXiv 1410.5401, NTM and LSTM, one or more of each."""
    for run in runs.values():
        _check(run)
    named = [(task, _name(run), run) for task in TASKS for run in runs.values() if run.task.name == task]
    rows = [_row(task, name, run) for task, name, run in named]
    lengths = [part for task, name, run in named for part in _by_length(task, name, run)]
    if not lengths:
        raise RunError("ntm measures at least one run with several train.final_lengths, such as one of copy.")
    tables = [
        Table("Bits per sequence after training, test split, at the lengths of training", rows),
        Table("Bits and wrong bits per sequence by length, beyond training", lengths),
    ]
    grams = [run for task, _, run in named if task == "dynamic_ngrams"]
    values = {"optimal bits of dynamic n-grams": _optimum(grams[0])} if grams else {}
    return Result(tables, values)


def _check(run: LoadedRun) -> None:
    kind = run.config["model"].get("type")
    if run.task.name not in TASKS or kind not in ("ntm", "recurrent_lm"):
        raise RunError(
            f"{run.folder} must be a run of model ntm or recurrent_lm on one of {', '.join(TASKS)}, got {kind} on "
            f"{run.task.name}."
        )
    if run.result is None or not run.result["finished"]:
        raise RunError(f"{run.folder} is unfinished; rerun its train.py command to resume.")


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    if model["type"] == "recurrent_lm":
        return model["cell"].upper()
    heads = f", {model['read_heads']} heads" if model.get("read_heads", 1) > 1 else ""
    return f"NTM, {'LSTM' if model['controller'] == 'lstm' else model['controller']} controller{heads}"


def _row(task: str, name: str, run: LoadedRun) -> Row:
    scores = (run.result or {})["lengths"][str(run.task.length)]
    return {
        "task": task,
        "model": name,
        "parameters": run.model.size(),
        "sequences": run.step * run.config["train"]["batch_size"],
        "bits per sequence": round(scores["bits_per_sequence"], 3),
        "wrong bits per sequence": round(scores["bit_errors"], 4) if "bit_errors" in scores else "",
        "seconds": round(training_seconds(run)),
    }


def _by_length(task: str, name: str, run: LoadedRun) -> list[Row]:
    """Scores at single lengths; that of training is a mixture where lengths vary."""
    result: dict[str, Any] = run.result or {}
    if len(result["lengths"]) < 2:
        return []
    return [
        {
            "task": task,
            "model": name,
            "length": int(length),
            "bits per sequence": float(f"{scores['bits_per_sequence']:.4g}"),
            "wrong bits per sequence": float(f"{scores['bit_errors']:.4g}"),
        }
        for length, scores in result["lengths"].items()
        if int(length) != run.task.length
    ]


def _optimum(run: LoadedRun) -> Row:
    """Bits of the optimal predictor on the sequences that the run was scored on."""
    count = run.config["train"]["final_batches"] * run.config["train"]["batch_size"]
    source = run.task.source("test", run.config["seed"])
    costs = []
    for number in range(count):
        one = source[number]
        sequence = np.append(one["inputs"][:, 0], one["targets"][-1, 0])
        costs.append(optimal_bits(sequence, run.task.context if isinstance(run.task, DynamicNGrams) else 5))
    return {"sequences": count, "bits": round(float(np.mean(costs)), 2)}


def _judge(result: Result) -> Verdict:
    rows = [row for row in result.rows() if row["task"] != "dynamic_ngrams"]
    learnt = [row for row in rows if row["wrong bits per sequence"] <= LEARNT]
    missed = _missed(rows)
    ahead = bool(learnt) and all(row["model"] != "LSTM" for row in learnt)
    bits = {row["model"]: row["bits per sequence"] for row in result.rows(task="dynamic_ngrams")}
    plain, grams = bits.pop("LSTM", None), bits.values()
    optimum = result.values.get("optimal bits of dynamic n-grams", {}).get("bits", 0.0)
    done, near = ", ".join(dict.fromkeys(_spoken(row["task"]) for row in learnt)) or "none of the tasks", ""
    if grams:
        baseline = "" if plain is None else f"the LSTM has {plain:.1f}, "
        spoken = f"n-grams ({min(grams):.1f} bits, {baseline}the optimum has {optimum:.1f})"
        if min(grams) > optimum + 5:
            missed.append(spoken)
        else:
            near = f", and {spoken}"
    return Verdict(
        "not reproduced" if not ahead else "partly confirmed" if missed else "confirmed",
        f"The NTM learnt {done}{_longest_copy(result)}{near}"
        + (f"; not reproduced: {', '.join(missed)}." if missed else "."),
    )


def _missed(rows: Sequence[Row]) -> list[str]:
    """Tasks that no NTM has learnt, with the wrong bits of the best and of the best LSTM."""
    missed = []
    for task in dict.fromkeys(row["task"] for row in rows):
        wrong: dict[bool, float] = {}
        for row in (row for row in rows if row["task"] == task):
            plain, bits = row["model"] == "LSTM", row["wrong bits per sequence"]
            wrong[plain] = min(bits, wrong.get(plain, bits))
        if wrong.get(False, 0.0) > LEARNT:
            baseline = f", the LSTM has {wrong[True]:.1f}" if True in wrong else ""
            missed.append(f"{_spoken(task)} to {LEARNT} wrong bits ({wrong[False]:.1f}{baseline})")
    return missed


def _spoken(task: str) -> str:
    return task.replace("_", " ")


def _longest_copy(result: Result) -> str:
    """Wrong bits of copy at the greatest length, of the first NTM and of the LSTM."""
    rows = result.rows(1, task="copy")
    if not rows:
        return ""
    most = max(row["length"] for row in rows)
    found = {
        row["model"].split(",")[0]: row["wrong bits per sequence"] for row in reversed(rows) if row["length"] == most
    }
    return (
        f" (copy of {most} vectors: " + ", ".join(f"{name} {found[name]:g} wrong bits" for name in sorted(found)) + ")"
    )


def _examples(runs: Runs) -> Mapping[str, Any]:
    """The paper's figure 6: inputs and outputs, vectors written and read, and where, of the first NTM on copy."""
    traced = [run for run in runs.values() if run.task.name == "copy" and _name(run) != "LSTM"]
    return {"heads": _draw_heads(traced[0])} if traced else {}


def _draw_heads(run: LoadedRun) -> Any:
    model: Any = run.module()
    length = min(SHOWN, run.config["model"]["slots"] - 4)
    task = run.task.with_length(length)
    one = task.source("test", run.config["seed"])[0]
    trace = jax.device_get(jax.jit(model.trace)(one["inputs"][None]))
    outputs = 1 / (1 + np.exp(-trace.logits[0]))
    panels = (
        (("inputs", one["inputs"]), ("outputs (probability of 1)", outputs)),
        (("added vectors", trace.adds[0, :, 0]), ("read vectors", trace.reads[0, :, 0])),
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
    return figure


def _summary(result: Result) -> list[Row]:
    """Bits per sequence, a column per model; empty where a task is not trained with it."""
    rows = result.rows()
    names = dict.fromkeys(row["model"] for row in rows)
    found: dict[str, Row] = {}
    for row in rows:
        empty = {"bits per sequence": row["task"], **dict.fromkeys(names, "")}
        found.setdefault(row["task"], empty)[row["model"]] = row["bits per sequence"]
    return list(found.values())


NTM = Study(
    name="ntm",
    title="Neural Turing Machine",
    claim="An NTM learns to copy in fewer sequences than an LSTM and generalises to lengths it was not trained on, "
    "where the LSTM fails; it learns repeat copy, associative recall and priority sort, and on 6-grams comes near the "
    "optimal predictor.",
    source="arXiv 1410.5401, section 4",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="length",
        value="bits per sequence",
        panel="task",
        table=1,
        keep=lambda row: row["task"] in ("copy", "repeat_copy", "associative_recall"),
        x="length (vectors, items)",
        y="bits per sequence",
        options={"styles": STYLES, "y_scale": "symlog"},
    ),
    caption="Cost per sequence by length on the test split, linear below 1 bit, logarithmic above; trained on copies "
    "of up to 20 vectors, on up to 5 vectors repeated up to 5 times, and on up to 6 items. One seed.",
    reads="configs/{copy,repeat_copy,associative_recall,dynamic_ngrams,priority_sort}.py",
    summary=_summary,
    examples=_examples,
)
