"""Context-free tasks of the Chomsky hierarchy, answered by a string: reverse string, stack manipulation.

The tasks of the same table with one answer are those of `memformer.lab.hierarchy`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from memformer.lab.hierarchy import WRITE
from memformer.lab.plots import Lines
from memformer.lab.runs import accuracies_by_seed, runs_by_row, spread_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, percent, pivot, spread

__all__ = ["PUBLISHED", "STRINGS"]

TASKS = ("reverse_string", "stack_manipulation")
MODELS: Mapping[str, Row] = {
    "DeltaFormer": {"model.memory": "deltaformer", "model.memory_options": {"deltaformer": WRITE}},
    "DeltaFormer, linear read": {
        "model.memory": "deltaformer",
        "model.memory_options": {"deltaformer": {**WRITE, "read_kernel": "linear"}},
    },
    "Transformer": {"model.memory": "softmax_attention"},
    "LSTM": {"model.memory": "lstm"},
}
# Of DeltaFormer, Transformer and LSTM.
PUBLISHED: Mapping[str, tuple[float, float, float]] = {
    "stack_manipulation": (0.583, 0.575, 0.591),
    "reverse_string": (0.634, 0.623, 0.609),
}
# Stated before the runs: accuracy of a string's tokens above which a model does not merely guess, of every seed.
MOST, FAR = 0.7, "250"
ROWS: Mapping[str, Row] = {
    f"{task} {model}": {"task.name": task, **row} for task in TASKS for model, row in MODELS.items()
}


def _measure(runs: Runs, settings: Settings) -> Result:
    rows = [_row(label, row) for label, row in runs_by_row(runs).items()]
    title = "Accuracy of the answer's tokens by length (test split): mean of the seeds (least to most)"
    return Result([Table(title, rows)], accuracies_by_seed(runs))


def _row(label: str, runs: Sequence[Any]) -> Row:
    task, _, model = label.partition(" ")
    paper = PUBLISHED[task][("DeltaFormer", "Transformer", "LSTM").index(model.partition(",")[0])]
    scores, chance = spread_by_length(runs, "at {}"), runs[0].task.chance
    return {"task": task, "model": model, **scores, "chance": percent(chance, 0), "paper": percent(paper)}


def _judge(result: Result) -> Verdict:
    far = {label: scores[FAR] for label, scores in result.values.items()}
    best = max(far, key=lambda label: max(far[label]))
    return Verdict(
        "confirmed" if max(far[best]) < MOST else "refuted",
        f"At {FAR} tokens the best is {best.replace('_', ' ')} with {spread(far[best])} of the answer's tokens "
        f"(needed of all, in every seed: less than {percent(MOST, 0)}).",
    )


STRINGS = Study(
    name="strings",
    title="Chomsky hierarchy: strings as answers",
    claim="On reverse string and stack manipulation DeltaFormer, the Transformer and the LSTM do not go far beyond "
    "guessing (57.5% to 63.4%).",
    source="DeltaFormer, NeurIPS 2025, table 5",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="at {}",
        panel="task",
        x="tokens",
        y="accuracy",
        level="chance",
        limits=(0, 1.04),
        options={"x_base": 2},
    ),
    caption="Accuracy of the answer's tokens on the test split by length, one layer trained on up to 20 tokens. One "
    "seed.",
    base={
        "task": {"length": 20},
        "model": {"width": 64, "heads": 4, "depth": 1, "feedforward": "swiglu"},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1500, "batch_size": 128, "final_lengths": (40, 100, 250), "final_batches": 4},
        "train.log_every": 50,
    },
    rows=ROWS,
    quick=Quick(
        {"reverse_string LSTM": ROWS["reverse_string LSTM"]},
        {"task.length": 4, "model.width": 16, "train.steps": 20, "train.batch_size": 16, "train.final_lengths": (8,)},
    ),
    summary=lambda result: pivot(result.rows(), "task", "model", "at 250", corner="accuracy at 250 tokens"),
)
