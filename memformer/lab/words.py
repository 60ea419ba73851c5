"""Words over a group: which memory follows the running product, by its letters' order and by length.

A letter is an element of the group, the label at t the product x_1 ... x_t (arXiv 2404.08819). One layer whose
transition is a product of n reflections I - beta k k^T, beta in (0, 2), follows a group whose elements are such
products: S3 with 2, S4 and A5 with 2 (rotations in three dimensions), S5 with 4 (arXiv 2502.10297). With beta in (0, 1)
no transition reflects; softmax attention adds and cannot follow at any depth that does not grow with the length.
"""

from collections.abc import Mapping
from typing import Any

from memformer.lab.runs import accuracies, accuracy_by_length, run_rows, train_runs
from memformer.lab.study import Study, legend_below, new_figure
from memformer.tasks.group_words import GROUPS
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["MODELS", "measure"]

# Display name, memory, its options, colour and line of the plot.
MODELS: dict[str, tuple[str, str, Mapping[str, Any], str, str]] = {
    "delta1": ("DeltaNet, beta in (0, 1)", "delta_rule", {"beta_limit": 1.0}, COLOURS[0], "--"),
    "delta2": ("DeltaNet, beta in (0, 2); n_h = 1", "delta_rule", {"beta_limit": 2.0}, COLOURS[0], "-"),
    "product2": ("DeltaProduct, n_h = 2", "delta_product", {"steps": 2, "beta_limit": 2.0}, COLOURS[1], "-"),
    "product3": ("DeltaProduct, n_h = 3", "delta_product", {"steps": 3, "beta_limit": 2.0}, COLOURS[1], "--"),
    "product4": ("DeltaProduct, n_h = 4", "delta_product", {"steps": 4, "beta_limit": 2.0}, COLOURS[1], ":"),
    "deltaformer": ("DeltaFormer", "deltaformer", {}, COLOURS[2], "-"),
    "softmax": ("softmax attention", "softmax_attention", {"rotary": True}, COLOURS[3], "-"),
    "lstm": ("LSTM", "lstm", {}, COLOURS[4], "-"),
}
# Steps a group is given. All 60 letters of A5 are not learnt in so few; two that generate the group are.
STEPS = {"S3": 500, "A5_two": 400, "S5_two": 1500, "S4_two": 500}
# An LSTM learns in more steps.
LSTM_STEPS = 2000
LENGTHS = (32, 128, 500)
BASE: Mapping[str, Any] = {
    "task": {"name": "group_words", "length": 32},
    "model": {"width": 64, "heads": 4, "depth": 1, "feedforward": "mlp"},
    "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.01},
    "train": {"batch_size": 64, "stop_accuracy": 0.999, "final_lengths": LENGTHS, "final_batches": 2, "log_every": 25},
}
QUICK_MODELS = ("product2", "softmax")
CLAIM = (
    "One layer follows S3, S4 and A5 with two reflections a letter (DeltaProduct, n_h = 2) and S5 with four "
    "(arXiv 2502.10297); DeltaNet with beta in (0, 1) and softmax attention follow none, an LSTM follows all "
    "(arXiv 2404.08819, 2411.12537)."
)


def measure(study: Study, *, quick: bool = False) -> None:
    """Trains every model on words of 32 letters of each group and tests it on up to 500.

    Args:
      study: takes what comes out.
      quick: S3 alone, two models, words of 8 letters.
    """
    groups, models = (("S3",), QUICK_MODELS) if quick else (tuple(STEPS), tuple(MODELS))
    pairs = [(group, model) for group in groups for model in models]
    table = {f"{group} {model}": _changes(group, model) for group, model in pairs}
    smaller = {
        "task.length": 8,
        "model.width": 32,
        "model.heads": 2,
        "train.steps": 200,
        "train.batch_size": 32,
        "train.final_lengths": (16,),
    }
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=smaller)
    found = {(group, model): runs[f"{group} {model}"] for group, model in pairs}
    study.claim = CLAIM
    shown = [_row(group, model, run) for (group, model), run in found.items()]
    size = next(iter(runs.values())).config["model"]
    title = f"One layer of width {size['width']}: right letters by length, and whole words (test split)"
    study.add_table(title, shown)
    study.add_table("What was trained", run_rows(runs))
    study.values = accuracies(runs)
    study.outcome = " ".join(_say(group, {m: run for (g, m), run in found.items() if g == group}) for group in groups)
    left = [group.partition("_")[0] for group in STEPS if group not in groups]
    if left:
        study.outcome += f" Not run: {', '.join(left)}."
    _draw(groups, found, study)


def _changes(group: str, model: str) -> dict[str, Any]:
    _, memory, options, _, _ = MODELS[model]
    conv = {"conv_width": 0} if memory in ("delta_rule", "delta_product") else {}
    return {
        "task.group": group,
        "model.memory": memory,
        "model.memory_options": {memory: {**conv, **options}} if options or conv else {},
        "train.steps": LSTM_STEPS if memory == "lstm" else STEPS[group],
    }


def _row(group: str, model: str, run: LoadedRun) -> dict[str, Any]:
    letters, words = accuracy_by_length(run), accuracy_by_length(run, "sequence_accuracy")
    shown = {f"{n} letters": f"{100 * value:.1f}%" for n, value in letters.items()}
    trained = run.config["task"]["length"]
    return {
        "group": _name(group),
        "model": MODELS[model][0],
        **shown,
        f"words of {trained}": f"{100 * words[trained]:.1f}%",
    }


def _name(group: str) -> str:
    return group.replace("_two", ", two letters")


def _say(group: str, runs: Mapping[str, LoadedRun]) -> str:
    """Who follows the group, and how far, in one sentence."""
    told = []
    for model, run in runs.items():
        letters = accuracy_by_length(run)
        near, far = letters[run.config["task"]["length"]], letters[max(letters)]
        told.append(f"{MODELS[model][0]} {100 * near:.0f}% / {100 * far:.0f}%")
    lengths = accuracy_by_length(next(iter(runs.values())))
    order = GROUPS[group][0]
    return f"{_name(group)} (words of {min(lengths)} / {max(lengths)}; guess {100 / order:.1f}%): {', '.join(told)}."


def _draw(groups: tuple[str, ...], found: Mapping[tuple[str, str], LoadedRun], study: Study) -> None:
    columns = min(2, len(groups))
    figure, axes = new_figure(-(-len(groups) // columns), columns, width=8.4, height=1.4 + 2.6 * -(-len(groups) // 2))
    for axis, group in zip(axes.flat, groups, strict=False):
        for (name, model), run in found.items():
            if name == group:
                label, _, _, colour, line = MODELS[model]
                letters = accuracy_by_length(run)
                axis.plot(list(letters), list(letters.values()), line, marker="o", ms=4, color=colour, label=label)
        axis.axhline(1 / GROUPS[group][0], color="0.4", linestyle="-.", linewidth=1, label="guess")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(letters), [str(n) for n in letters])
        axis.minorticks_off()
        axis.set_ylim(0, 1.04)
        axis.set_title(f"{_name(group)}: {GROUPS[group][0]} elements", fontsize=10)
        axis.set_xlabel("letters in the word")
        axis.set_ylabel("right letters")
    legend_below(figure, axes[0, 0], columns=3, fontsize=8)
    trained = next(iter(found.values())).config["task"]["length"]
    study.save_figure(figure, "length", f"One layer, trained on words of {trained} letters. Claim: {CLAIM}")
