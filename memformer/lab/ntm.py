"""The Neural Turing Machine beside an LSTM: cost after training, generalisation to longer sequences, its heads."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, cast

import jax
import numpy as np

from memformer.lab.plots import Lines, new_figure
from memformer.lab.runs import training_seconds
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, percent, spread, spread_numbers
from memformer.tasks.ntm import DynamicNGrams, PrioritySort, optimal_bits
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
# Stated before the runs of three seeds: a seed has learnt a task below so many wrong bits per sequence (arXiv
# 1807.08518), a model where most of its seeds have, and n-grams within so many bits of the optimum in the mean.
LEARNT, NEAR = 0.1, 5.0
# Where two neighbours in the order of a priority sort differ by less than the resolution of a model, it guesses their
# order: half of the sequences with a gap below 0.002 are wrong, all with gaps above 0.02 right (four heads, seed 0). So
# what counts is whether sequences with gaps of at least the last of `GAPS` are right to a share of `SORTED`; this
# replaced `LEARNT` after seed 0 and before seeds 1 and 2.
GAPS, SORTED = (0.002, 0.005, 0.01, 0.02), 0.99
# Vectors of the copy whose heads are drawn; fewer where the memory has no room for them.
SHOWN = 100
BITS, WRONG, OPTIMUM = "bits per sequence", "wrong bits per sequence", "optimal bits of dynamic n-grams"
APART = f"right sequences with gaps of at least {GAPS[-1]}"


def _measure(runs: Runs, settings: Settings) -> Result:
    """Scores of runs on the tasks of arXiv 1410.5401, NTM and LSTM, one or more seeds of each."""
    for run in runs.values():
        _check(run)
    groups: dict[tuple[str, str], list[LoadedRun]] = {}
    for task in TASKS:
        for run in (run for run in runs.values() if run.task.name == task):
            groups.setdefault((task, _name(run)), []).append(run)
    lengths = [row for (task, name), group in groups.items() for row in _by_length(task, name, group)]
    if not lengths:
        raise RunError("ntm measures at least one run with several train.final_lengths, such as one of copy.")
    tables = [
        Table(
            "After training, test split, at the lengths of training: mean of the seeds (least to most)",
            [_row(task, name, group) for (task, name), group in groups.items()],
        ),
        Table("Bits and wrong bits per sequence by length, beyond training", lengths),
    ]
    values: dict[str, Any] = {f"{task}: {name}": _scores(group) for (task, name), group in groups.items()}
    sorting = {name: group for (task, name), group in groups.items() if task == "priority_sort"}
    if sorting:
        shares = {name: [_sorted_by_gap(run, settings["sorted"]) for run in group] for name, group in sorting.items()}
        tables.append(
            Table(
                "Priority sort: sequences that are wholly right, by the least gap between neighbours in the order",
                [{"model": name, **_gap_columns(found)} for name, found in shares.items()],
            )
        )
        for name, found in shares.items():
            values[f"priority_sort: {name}"][APART] = [round(seed[-1], 4) for seed in found]
    grams = [group[0] for (task, _), group in groups.items() if task == "dynamic_ngrams"]
    return Result(tables, values | ({OPTIMUM: _optimum(grams[0])} if grams else {}))


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


def _row(task: str, name: str, group: Sequence[LoadedRun]) -> Row:
    found = _scores(group)
    return {
        "task": task,
        "model": name,
        "parameters": group[0].model.size(),
        "sequences": group[0].step * group[0].config["train"]["batch_size"],
        "seeds": len(group),
        BITS: _cell(found[BITS]),
        WRONG: _cell(found[WRONG]) if WRONG in found else "",
        "seconds": _cell([round(training_seconds(run)) for run in group]),
    }


def _scores(group: Sequence[LoadedRun]) -> dict[str, list[float]]:
    """Bits and, where the task counts them, wrong bits per sequence at the lengths of training, by seed."""
    scores = [_result(run)[str(run.task.length)] for run in group]
    names = {BITS: "bits_per_sequence", WRONG: "bit_errors"}
    return {name: [round(one[key], 4) for one in scores] for name, key in names.items() if key in scores[0]}


def _result(run: LoadedRun) -> Mapping[str, Mapping[str, float]]:
    """The run's scores by length."""
    return (run.result or {})["lengths"]


def _cell(values: Sequence[float]) -> Any:
    if len(values) > 1:
        return spread_numbers(values)
    return values[0] if isinstance(values[0], int) else float(f"{values[0]:.4g}")


def _by_length(task: str, name: str, group: Sequence[LoadedRun]) -> list[Row]:
    """Scores at single lengths; that of training is a mixture where lengths vary."""
    found = [_result(run) for run in group]
    if len(found[0]) < 2:
        return []
    return [
        {
            "task": task,
            "model": name,
            "length": int(length),
            BITS: _cell([one[length]["bits_per_sequence"] for one in found]),
            WRONG: _cell([one[length]["bit_errors"] for one in found]),
        }
        for length in found[0]
        if int(length) != group[0].task.length
    ]


def _sorted_by_gap(run: LoadedRun, count: int) -> list[float]:
    """Shares of test sequences that are wholly right: those with a least gap below each of `GAPS`, then those above."""
    task, model = cast(PrioritySort, run.task), cast(Any, run.module())
    source = task.source("test", run.config["seed"])
    examples = [source[number] for number in range(count)]
    inputs, targets = (np.stack([one[key] for one in examples]) for key in ("inputs", "targets"))
    logits = np.asarray(jax.jit(lambda x: model(x).logits)(inputs))
    answers = slice(task.length + 1, task.steps)
    right = ((logits > 0) == (targets > 0.5))[:, answers].all((1, 2))
    rising = np.sort(-inputs[:, : task.length, -1])
    # the last vector of the answer has a neighbour that is left out
    bins = np.digitize(np.diff(rising)[:, : task.answers].min(1), GAPS)
    return [float(right[bins == place].mean()) for place in range(len(GAPS) + 1)]


def _gap_columns(found: Sequence[Sequence[float]]) -> Row:
    """The shares of the seeds by gap, as columns."""
    names = [f"below {GAPS[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(GAPS)), f"at least {GAPS[-1]}"]
    return {name: spread(seeds) for name, seeds in zip(names, zip(*found, strict=True), strict=True)}


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
    scores: dict[str, dict[str, Any]] = {}
    for label, found in result.values.items():
        task, _, name = label.partition(": ")
        if name:
            scores.setdefault(task, {})[name] = found
    grams = scores.pop("dynamic_ngrams", {})
    learnt = {task: [name for name in models if _learns(models[name])] for task, models in scores.items()}
    done = [f"{_spoken(task)} ({_seeds(models)})" for task, models in scores.items() if _ntm(learnt[task])]
    missed = [_missed(task, models) for task, models in scores.items() if not _ntm(learnt[task])]
    near = ""
    if _ntm(grams):
        best, bits = min(fmean(grams[name][BITS]) for name in _ntm(grams)), result.values[OPTIMUM]["bits"]
        baseline = f"the LSTM has {fmean(grams['LSTM'][BITS]):.1f}, " if "LSTM" in grams else ""
        spoken = f"n-grams ({best:.1f} bits, {baseline}the optimum has {bits:.1f})"
        if best > bits + NEAR:
            missed.append(spoken)
        else:
            near = f", and comes near the optimum of {spoken}"
    return Verdict(
        "not reproduced"
        if not done or "LSTM" in learnt.get("copy", [])
        else "partly confirmed"
        if missed
        else "confirmed",
        f"The NTM learns {', '.join(done) or 'none of the tasks'}{near}{_longest_copy(result)}"
        + (f"; not reproduced: {', '.join(missed)}." if missed else ".")
        + f" Needed in most seeds: at most {LEARNT} wrong bits per sequence, in priority sort {percent(SORTED, 0)} "
        f"right sequences with gaps of at least {GAPS[-1]}; n-grams within {NEAR:g} bits of the optimum, and an LSTM "
        "that does not learn to copy.",
    )


def _ntm(names: Iterable[str]) -> list[str]:
    return [name for name in names if name != "LSTM"]


def _learns(found: Mapping[str, Sequence[float]]) -> bool:
    return 2 * _count(found) > len(found[WRONG])


def _count(found: Mapping[str, Sequence[float]]) -> int:
    """Seeds that have learnt the task."""
    if APART in found:
        return sum(share >= SORTED for share in found[APART])
    return sum(bits <= LEARNT for bits in found[WRONG])


def _seeds(models: Mapping[str, Any]) -> str:
    """Seeds of the best NTM that have learnt the task, out of all."""
    best = max((models[name] for name in _ntm(models)), key=_count)
    return f"{_count(best)} of {len(best[WRONG])} seeds" if len(best[WRONG]) > 1 else "one seed"


def _missed(task: str, models: Mapping[str, Any]) -> str:
    """A task that no NTM has learnt, with the wrong bits of the best and of the LSTM."""
    wrong = {name: fmean(found[WRONG]) for name, found in models.items()}
    plain = wrong.pop("LSTM", None)
    baseline = "" if plain is None else f", the LSTM has {plain:.1f}"
    return f"{_spoken(task)} ({min(wrong.values()):.1f} wrong bits{baseline})" if wrong else _spoken(task)


def _spoken(task: str) -> str:
    return task.replace("_", " ")


def _longest_copy(result: Result) -> str:
    """Wrong bits of copy at the greatest length, of the first NTM and of the LSTM."""
    rows = result.rows(1, task="copy")
    if not rows:
        return ""
    most = max(row["length"] for row in rows)
    found = {row["model"].split(",")[0]: row[WRONG] for row in reversed(rows) if row["length"] == most}
    return f"; copy of {most} vectors: " + ", ".join(f"{name} {found[name]} wrong bits" for name in sorted(found))


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
        found.setdefault(row["task"], {BITS: row["task"], **dict.fromkeys(names, "")})[row["model"]] = row[BITS]
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
        value=BITS,
        panel="task",
        table=1,
        keep=lambda row: row["task"] in ("copy", "repeat_copy", "associative_recall"),
        x="length (vectors, items)",
        y=BITS,
        options={"styles": STYLES, "y_scale": "symlog"},
    ),
    caption="Cost per sequence by length on the test split, linear below 1 bit, logarithmic above; trained on copies "
    "of up to 20 vectors, on up to 5 vectors repeated up to 5 times, and on up to 6 items. One seed "
    "(priority sort: three); of more, lines are means and bands the least to the greatest.",
    reads="configs/{copy,repeat_copy,associative_recall,dynamic_ngrams,priority_sort}.py",
    # sequences of a priority sort that are scored by their least gap
    settings={"sorted": 4096},
    summary=_summary,
    examples=_examples,
)
