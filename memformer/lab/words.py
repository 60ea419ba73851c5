"""Words over a group: which memory tracks the running product of letters, by group and by length.

A letter is an element of the group, the label at t the product x_1 ... x_t (arXiv 2404.08819). One layer whose
transition is a product of n reflections I - beta k k^T, beta in (0, 2), tracks a group whose elements are such
products: S3 with 2, S4 and A5 with 2 (rotations in three dimensions), S5 with 4 (arXiv 2502.10297). With beta in (0, 1)
no transition reflects; softmax attention adds, and cannot track at any depth that does not grow with the length.

One write per letter cannot track a letter of order 3 or more (see `memformer.lab.reflections`).

The code of 2502.10297 (automl/DeltaProduct) trains one layer of eight heads on 100,000 words of 128 letters for 100
epochs in batches of 2048, 1.2e9 letters. Words of 32 letters teach the product, not exact reflections: errors grow
beyond. The last two models have a curriculum from 8 to 128 letters instead.
"""

from collections.abc import Mapping
from typing import NamedTuple

from memformer.lab.plots import Lines
from memformer.lab.runs import accuracies, accuracy_by_length, columns_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent
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
CLIMBS: Mapping[str, Row] = {
    "S3 climb2": {**CLIMB, "train.steps": 800},
    "S5_two climb4": {**CLIMB, "train.steps": 2500},
}


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
    for label, run in runs.items():
        group, _, model = label.partition(" ")
        least, words = min(accuracy_by_length(run, "sequence_accuracy").items())
        row = {"group": group_name(group), "model": MODELS[model].name, **columns_by_length(run, "{} letters")}
        rows.append({**row, f"words of {least}": percent(words)})
    title = f"Accuracy of letters by length, and of whole words (one layer of width {run.config['model']['width']})"
    return Result([Table(title, rows)], accuracies(runs))


def _judge(result: Result) -> Verdict:
    def at(length: int, model: str, *groups: str) -> float:
        return min(result.values[f"{group} {model}"][str(length)] for group in groups)

    solvable, every = ("S3", "S4_two", "A5_two"), tuple(STEPS)
    others = [result.values[f"{group} {model}"]["32"] for group in STEPS for model in ("delta1", "softmax")]
    parts = {
        "S3, S4 and A5 with two reflections": (at(32, "product2", *solvable), at(500, "product2", *solvable)),
        "S5 with four": (at(32, "product4", "S5_two"), at(500, "product4", "S5_two")),
        "S5 with two": (at(32, "product2", "S5_two"), at(500, "product2", "S5_two")),
        "S3 with two by curriculum": (at(32, "climb2", "S3"), at(500, "climb2", "S3")),
        "S5 with four by curriculum": (at(32, "climb4", "S5_two"), at(500, "climb4", "S5_two")),
        "LSTM, all groups": (at(32, "lstm", *every), at(500, "lstm", *every)),
    }
    best = max(result.values[f"{group} deltaformer"]["32"] for group in STEPS)
    one = max(result.values[f"{group} delta2"]["128"] for group in STEPS)
    found = ", ".join(f"{name} {percent(near)} and {percent(far)}" for name, (near, far) in parts.items())
    near = min(parts["S3, S4 and A5 with two reflections"][0], parts["S5 with four"][0]) > 0.95
    return Verdict(
        grade(
            near and max(others) < 0.5,
            one < 0.5,
            parts["S3 with two by curriculum"][1] > 0.95,
            parts["S5 with four by curriculum"][1] > 0.95,
            parts["LSTM, all groups"][1] > 0.95,
        ),
        f"Least accuracy at 32 and 500 letters: {found}. At 32, the best of all groups: DeltaFormer {percent(best)}, "
        f"DeltaNet with beta in (0, 1) and softmax attention {percent(max(others))}. DeltaNet with beta in (0, 2), one "
        f"write per letter, has at most {percent(one)} at 128.",
    )


def _summary(result: Result) -> list[Row]:
    """Accuracy at 500 letters, a column per group; empty where a model is not run on a group."""
    found: dict[str, Row] = {}
    for row in result.rows():
        empty = {"accuracy at 500 letters": row["model"], **dict.fromkeys(map(group_name, STEPS), "")}
        found.setdefault(row["model"], empty)[row["group"]] = row["500 letters"]
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
    "curriculum on words of 8 to 128. One seed.",
    base={
        **BASE,
        "task.length": 32,
        "train.batch_size": 64,
        "train.final_lengths": (32, 128, 500),
        "train.final_batches": 2,
    },
    rows=ROWS,
    quick=Quick(
        {"S3 product2": ROWS["S3 product2"]},
        {
            "task.length": 8,
            "model.width": 32,
            "model.heads": 2,
            "train.steps": 200,
            "train.batch_size": 32,
            "train.final_lengths": (),
        },
    ),
    summary=_summary,
)
