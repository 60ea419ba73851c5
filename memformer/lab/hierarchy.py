"""Six tasks of the Chomsky hierarchy, trained on short strings and tested on long ones (DeltaFormer, table 5).

One answer at the end: parity, even pairs, cycle navigation, modular arithmetic. A string given back: reverse string,
stack manipulation (the tasks of arXiv 2207.02098). Scores are accuracies of tokens at one length beyond training.
"""

from collections.abc import Mapping
from typing import Any

from memformer.lab.runs import accuracies, accuracy_by_length, run_rows, train_runs
from memformer.lab.study import Study, legend_below, new_figure
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["MODELS", "PUBLISHED", "TASKS", "measure"]

TASKS = ("parity", "even_pairs", "cycle_navigation", "modular_arithmetic", "reverse_string", "stack_manipulation")
WRITE = {"write_kernel": "linear", "unit_keys": True, "beta_limit": 2.0}
# A softmax over 250 slots is not one over 20; a linear read is the same at every length. The paper does not say which
# it has.
MODELS: dict[str, Mapping[str, Any]] = {
    "DeltaFormer": {"model.memory": "deltaformer", "model.memory_options": {"deltaformer": WRITE}},
    "DeltaFormer, linear read": {
        "model.memory": "deltaformer",
        "model.memory_options": {"deltaformer": {**WRITE, "read_kernel": "linear"}},
    },
    "Transformer": {"model.memory": "softmax_attention"},
    "LSTM": {"model.memory": "lstm"},
}
# Per cent, of DeltaFormer, Transformer, LSTM; of the other two tasks no published number is at hand.
PUBLISHED: Mapping[str, tuple[float, float, float]] = {
    "parity": (100.0, 52.0, 100.0),
    "modular_arithmetic": (100.0, 24.2, 100.0),
    "stack_manipulation": (58.3, 57.5, 59.1),
    "reverse_string": (63.4, 62.3, 60.9),
}
LENGTHS = (40, 100, 250)
BASE: Mapping[str, Any] = {
    "task": {"length": 20},
    "model": {"width": 64, "heads": 4, "depth": 1, "feedforward": "swiglu"},
    "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50},
    # No stop at the first perfect batch: what is exact at 250 tokens is learnt after what is exact at 20.
    "train": {"steps": 1500, "batch_size": 128, "final_lengths": LENGTHS, "final_batches": 4, "log_every": 50},
}
CLAIM = (
    "On parity and modular arithmetic DeltaFormer and the LSTM are right at any length (100%) while the Transformer "
    "guesses (52.0%, 24.2%); on reverse string and stack manipulation none of them goes far beyond guessing "
    "(57.5% to 63.4%; DeltaFormer, table 5)."
)


def measure(study: Study, *, quick: bool = False) -> None:
    """Trains each model on each task and tests it on longer strings.

    Args:
      study: takes what comes out.
      quick: parity of up to 6 bits, DeltaFormer and the Transformer.
    """
    tasks, models = (TASKS[:1], ("DeltaFormer", "Transformer")) if quick else (TASKS, tuple(MODELS))
    table = {f"{task} {model}": {"task.name": task, **MODELS[model]} for task in tasks for model in models}
    smaller = {
        "task.length": 6,
        "model.width": 32,
        "model.heads": 2,
        "train.steps": 150,
        "train.batch_size": 32,
        "train.final_lengths": (12,),
    }
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=smaller)
    study.claim = CLAIM
    rows = [_row(task, model, runs[f"{task} {model}"]) for task in tasks for model in models]
    study.add_table("Accuracy of the answer's tokens by length (test split)", rows)
    study.add_table("What was trained", run_rows(runs))
    study.values = accuracies(runs)
    study.outcome = _outcome(tasks, models, runs)
    _draw(tasks, models, runs, study)


def _row(task: str, model: str, run: LoadedRun) -> dict[str, Any]:
    published = PUBLISHED.get(task)
    scores = {f"at {n}": f"{100 * value:.1f}%" for n, value in accuracy_by_length(run).items()}
    column = ("DeltaFormer", "Transformer", "LSTM").index(model.partition(",")[0])
    paper = f"{published[column]}%" if published else "not known"
    guess = f"{100 / run.task.num_classes:.0f}%" if run.task.chance is None else f"{100 * run.task.chance:.0f}%"
    return {"task": task, "model": model, **scores, "guess": guess, "paper": paper}


def _outcome(tasks: tuple[str, ...], models: tuple[str, ...], runs: Mapping[str, LoadedRun]) -> str:
    told = []
    for task in tasks:
        found = {model: accuracy_by_length(runs[f"{task} {model}"]) for model in models}
        longest = max(found[models[0]])
        said = ", ".join(f"{model} {100 * scores[longest]:.0f}%" for model, scores in found.items())
        told.append(f"{task.replace('_', ' ')}: {said}")
    trained = next(iter(runs.values())).config["task"]["length"]
    return f"Trained on up to {trained} tokens, asked for {longest}: {'; '.join(told)}."


def _draw(tasks: tuple[str, ...], models: tuple[str, ...], runs: Mapping[str, LoadedRun], study: Study) -> None:
    columns = min(3, len(tasks))
    rows = len(tasks) // columns
    figure, axes = new_figure(rows, columns, width=8.4, height=1.0 + 2.3 * rows)
    styles = dict(zip(MODELS, zip(COLOURS, ("o-", "D-", "s--", "^:"), strict=False), strict=False))
    for axis, task in zip(axes.flat, tasks, strict=True):
        for model in models:
            scores = accuracy_by_length(runs[f"{task} {model}"])
            colour, line = styles[model]
            axis.plot(list(scores), list(scores.values()), line, color=colour, label=model, markersize=4)
        axis.axhline(runs[f"{task} {models[0]}"].task.chance, color="0.4", linestyle="-.", linewidth=1, label="guess")
        axis.set_xscale("log")
        axis.set_xticks(list(scores), [str(n) for n in scores])
        axis.minorticks_off()
        axis.set_ylim(0, 1.04)
        axis.set_title(task.replace("_", " "), fontsize=10)
        axis.set_xlabel("tokens asked about")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    legend_below(figure, axes.flat[0], fontsize=9)
    trained = next(iter(runs.values())).config["task"]["length"]
    study.save_figure(figure, "length", f"One layer, trained on up to {trained} tokens. Claim: {CLAIM}")
