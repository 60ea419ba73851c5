"""Words over a group: which memory tracks the running product of letters, by group and by length.

A letter is an element of the group, the label at t the product x_1 ... x_t (arXiv 2404.08819). One layer whose
transition is a product of n reflections I - beta k k^T, beta in (0, 2), tracks a group whose elements are such
products: S3 with 2, S4 and A5 with 2 (rotations in three dimensions), S5 with 4 (arXiv 2502.10297). With beta in (0, 1)
no transition reflects; softmax attention adds, and cannot track at any depth that does not grow with the length.

One write per letter cannot track a letter of order 3 or more (see `memformer.lab.reflections`).

The code of 2502.10297 (automl/DeltaProduct) trains one layer of eight heads on 100,000 words of 128 letters for 100
epochs in batches of 2048, 1.2e9 letters. Words of 32 letters teach the product, not exact reflections: errors grow
beyond. The last three models have a curriculum from 8 to 128 letters instead.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

from memformer.lab.plots import Lines
from memformer.lab.runs import accuracies_by_seed, accuracy_by_length, runs_by_row, spread_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent, spread
from memformer.tasks.group_words import GROUPS
from memformer.training.plots import COLOURS

__all__ = ["BASE", "MODELS", "WORDS", "Model", "changes", "group_name"]


class Model(NamedTuple):
    """A model that is trained on words.

    Attributes:
      name: in tables and figures.
      memory: name in `memformer.layers.MEMORIES`.
      options: of its layer.
      colour, line: in the figure.
    """

    name: str
    memory: str
    options: Row
    colour: str
    line: str


_BOUNDED: Row = {"conv_width": 0, "beta_limit": 1.0}
_PLAIN: Row = {"conv_width": 0, "beta_limit": 2.0}
MODELS: Mapping[str, Model] = {
    "delta1": Model("DeltaNet, beta in (0, 1)", "delta_rule", _BOUNDED, COLOURS[0], "--"),
    "delta2": Model("DeltaNet, beta in (0, 2)", "delta_rule", _PLAIN, COLOURS[0], "-"),
    "product2": Model("DeltaProduct, n_h = 2", "delta_product", {**_PLAIN, "steps": 2}, COLOURS[1], "-"),
    "product3": Model("DeltaProduct, n_h = 3", "delta_product", {**_PLAIN, "steps": 3}, COLOURS[1], "--"),
    "product4": Model("DeltaProduct, n_h = 4", "delta_product", {**_PLAIN, "steps": 4}, COLOURS[1], "-."),
    "deltaformer": Model("DeltaFormer", "deltaformer", {}, COLOURS[2], "-"),
    "softmax": Model("softmax attention", "softmax_attention", {"rotary": True}, COLOURS[3], "-"),
    "lstm": Model("LSTM", "lstm", {}, COLOURS[4], "-"),
    "climb2": Model("n_h = 2, by curriculum", "delta_product", {**_PLAIN, "steps": 2}, COLOURS[5], "-"),
    "climb4": Model("n_h = 4, by curriculum", "delta_product", {**_PLAIN, "steps": 4}, COLOURS[5], "-."),
    "climb_lstm": Model("LSTM of width 128, by curriculum", "lstm", {}, COLOURS[4], "--"),
}
# What all runs over words share, also those of `memformer.lab.reflections`.
BASE: Row = {
    "task": {"name": "group_words"},
    "model": {"width": 64, "heads": 4, "depth": 1, "feedforward": "mlp"},
    "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.01},
    "train": {"stop_accuracy": 0.999, "log_every": 25},
}
# Group to training steps. All 60 letters of A5 are not learnt in so few; two that generate the group are.
STEPS: Mapping[str, int] = {"S3": 500, "A5_two": 400, "S5_two": 1500, "S4_two": 500}
LSTM_STEPS = 2000
CLIMB: Row = {
    "task.length": 128,
    "train.curriculum": {"enabled": True, "start": 8, "stop": 128, "factor": 2, "accuracy": 0.98},
    "train.batch_size": 32,
}
# 64 units of an LSTM do not learn the 120 elements of S5: after 5000 steps of a curriculum they have 91% of 32 letters.
WIDE: Row = {"model.width": 128, "train.curriculum.accuracy": 0.95}
CLIMBS: Mapping[str, Row] = {
    "S3 climb2": {**CLIMB, "train.steps": 800},
    "S5_two climb4": {**CLIMB, "train.steps": 2500},
    "A5_two climb_lstm": {**CLIMB, **WIDE, "train.steps": 5000},
    "S5_two climb_lstm": {**CLIMB, **WIDE, "train.steps": 5000},
}
LENGTHS = (32, 128, 500)
COLUMNS = tuple(f"{length} letters" for length in LENGTHS)
# Stated before the runs of three seeds: a model tracks a group with this accuracy in the mean over the seeds, and fails
# where every seed is below the second.
TRACKS, FAILS = 0.95, 0.5


def changes(group: str, model: Model) -> Row:
    """The changes of the config that make a run of this group and model."""
    options = {model.memory: model.options} if model.options else {}
    return {"task.group": group, "model.memory": model.memory, "model.memory_options": options}


def group_name(group: str) -> str:
    """The group and its letters, for tables and figures.

    Example:
      >>> group_name("S3"), group_name("S5_two"), group_name("S5_swaps")
      ('S3', 'S5, two letters', 'S5, swaps')
    """
    group, _, letters = group.partition("_")
    return f"{group}, {'two letters' if letters == 'two' else letters}" if letters else group


ROWS: Mapping[str, Row] = {
    f"{group} {name}": {
        **changes(group, model),
        "train.steps": LSTM_STEPS if model.memory == "lstm" else STEPS[group],
    }
    for group in STEPS
    for name, model in MODELS.items()
    if not name.startswith("climb")
} | {label: {**changes(group, MODELS[name]), **CLIMBS[label]} for label in CLIMBS for group, name in [label.split()]}


def _measure(runs: Runs, settings: Settings) -> Result:
    rows = []
    for label, row in runs_by_row(runs).items():
        group, _, model = label.partition(" ")
        # without the length at which a curriculum ended early
        columns = {name: cell for name, cell in spread_by_length(row, "{} letters").items() if name in COLUMNS}
        words = spread([accuracy_by_length(run, "sequence_accuracy")[LENGTHS[0]] for run in row])
        columns[f"words of {LENGTHS[0]}"] = words
        rows.append({"group": group_name(group), "model": MODELS[model].name, **columns})
    width = next(iter(runs.values())).config["model"]["width"]
    title = f"Accuracy of letters by length, one layer of width {width}: mean of the seeds (least to most)"
    return Result([Table(title, rows)], accuracies_by_seed(runs))


def _judge(result: Result) -> Verdict:
    def worst(length: int, model: str, *groups: str) -> float:
        """The mean over the seeds of the group that has the least."""
        return min(fmean(result.values[f"{group} {model}"][str(length)]) for group in groups)

    def best(length: int, *models: str) -> float:
        """The greatest of all groups and seeds."""
        return max(max(result.values[f"{group} {model}"][str(length)]) for group in STEPS for model in models)

    parts = {
        "S3, S4 and A5 with two reflections": ("product2", ("S3", "S4_two", "A5_two")),
        "S5 with four": ("product4", ("S5_two",)),
        "S5 with two": ("product2", ("S5_two",)),
        "S3 with two by curriculum": ("climb2", ("S3",)),
        "S5 with four by curriculum": ("climb4", ("S5_two",)),
        "LSTM, S3 and S4": ("lstm", ("S3", "S4_two")),
        "LSTM, A5 and S5 by curriculum": ("climb_lstm", ("A5_two", "S5_two")),
    }
    found = {name: (worst(32, model, *groups), worst(500, model, *groups)) for name, (model, groups) in parts.items()}
    told = ", ".join(f"{name} {percent(near)} and {percent(far)}" for name, (near, far) in found.items())
    bounded, one = best(32, "delta1", "softmax"), best(128, "delta2")
    return Verdict(
        grade(
            min(found["S3, S4 and A5 with two reflections"][0], found["S5 with four"][0]) > TRACKS,
            bounded < FAILS,
            one < FAILS,
            found["S3 with two by curriculum"][1] > TRACKS,
            found["S5 with four by curriculum"][1] > TRACKS,
            found["LSTM, S3 and S4"][1] > TRACKS,
            found["LSTM, A5 and S5 by curriculum"][1] > TRACKS,
        ),
        f"Accuracy at 32 and 500 letters, mean of three seeds, of the group that has the least: {told}. The best seed "
        f"of all groups: DeltaFormer {percent(best(32, 'deltaformer'))} at 32, DeltaNet with beta in (0, 1) and "
        f"softmax attention {percent(bounded)} at 32, DeltaNet with beta in (0, 2), one write per letter, "
        f"{percent(one)} at 128. Needed: {percent(TRACKS, 0)} at 32 of those that track, at 500 by curriculum, and "
        f"less than {percent(FAILS, 0)} of those that cannot.",
    )


def _summary(result: Result) -> list[Row]:
    """Accuracy at 500 letters, a column per group; empty where a model is not run on a group."""
    found: dict[str, Row] = {}
    for row in result.rows():
        # n_h = 2 on S3, 4 on S5
        name = "DeltaProduct, by curriculum" if row["model"].startswith("n_h") else row["model"]
        empty = {"accuracy at 500 letters": name, **dict.fromkeys(map(group_name, STEPS), "")}
        found.setdefault(name, empty)[row["group"]] = row["500 letters"]
    return list(found.values())


STYLES = {model.name: {"color": model.colour, "linestyle": model.line} for model in MODELS.values()}
WORDS = Study(
    name="words",
    title="Words over a group",
    claim="One layer tracks S3, S4 and A5 with two reflections per letter (DeltaProduct, n_h = 2) and S5 with four. "
    "One write per letter cannot, since the eigenvalues of its transition are real; DeltaNet with beta in (0, 1) and "
    "softmax attention track none of them, an LSTM tracks all.",
    source="arXiv 2502.10297, 2404.08819, 2411.12537",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="{} letters",
        panel="group",
        x="letters in the word",
        y="accuracy",
        level={group_name(group): 1 / GROUPS[group][0] for group in STEPS},
        limits=(0, 1.04),
        columns=2,
        options={"styles": STYLES, "x_base": 2},
    ),
    caption="Accuracy of the running product on the test split, one layer trained on words of 32 letters, by "
    "curriculum on words of 8 to 128; lines: mean of three seeds, bands: least to greatest.",
    base={
        **BASE,
        "task.length": LENGTHS[0],
        "train.batch_size": 64,
        "train.final_lengths": LENGTHS,
        "train.final_batches": 2,
    },
    rows=ROWS,
    seeds=3,
    quick=Quick(
        {"S3 product2": ROWS["S3 product2"]},
        {
            "task.length": 8,
            "model.width": 32,
            "model.heads": 2,
            "train.steps": 200,
            "train.batch_size": 32,
            "train.final_lengths": LENGTHS[:1],
        },
    ),
    summary=_summary,
)
