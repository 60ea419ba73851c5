"""Forgetting on recall whose values are overwritten: the latest value of a key, after more writes than in training.

Each memory stands with and without a log decay per head. Softmax attention keeps every value of a key, and only
positions or a decay tell the latest; DeltaFormer and the delta rule erase what they write again. One layer with a short
convolution, which puts a pair into one token.

A forget gate starts at one half (b = 0, as in the paper's code by default): of a pair ten tokens back a query then sees
a thousandth. In 500 steps that is seldom unlearnt, so two rows that start slowly were added after the first runs, by
the option of that code (`decay_time`).
"""

from collections.abc import Mapping

from memformer.lab.plots import Lines, line_style
from memformer.lab.runs import accuracies_by_seed, runs_by_row, spread_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent, spread

__all__ = ["FORGETTING", "MODELS"]

# Tokens after which the heads that forget slowly at first keep 1/e.
SLOW = (8.0, 64.0)
# Display name to family, memory and its options.
MODELS: Mapping[str, tuple[str, str, Row]] = {
    "rotary positions": ("softmax attention", "softmax_attention", {"rotary": True}),
    "neither": ("softmax attention", "softmax_attention", {"rotary": False}),
    "softmax, forgets": ("softmax attention", "fox", {}),
    "softmax, slowly at first": ("softmax attention", "fox", {"decay_time": SLOW}),
    "DeltaFormer": ("DeltaFormer", "deltaformer", {}),
    "DeltaFormer, forgets": ("DeltaFormer", "gated_deltaformer", {}),
    "DeltaFormer, slowly at first": ("DeltaFormer", "gated_deltaformer", {"decay_time": SLOW}),
    "delta rule": ("delta rule", "delta_rule", {}),
    "delta rule, forgets": ("delta rule", "gated_delta_rule", {"output_gate": None}),
}
ROWS: Mapping[str, Row] = {
    label: {"model.memory": memory, "model.memory_options": {memory: {"conv_width": 4, **options}}}
    for label, (_, memory, options) in MODELS.items()
}
# What the claim needs, stated before the runs: forgetting gains this much at FAR pairs, beyond the spread of the seeds.
GAIN, FAR = 0.1, "128"


def _measure(runs: Runs, settings: Settings) -> Result:
    rows = [
        {"family": MODELS[label][0], "memory": label, **spread_by_length(row, "{} pairs")}
        for label, row in runs_by_row(runs).items()
    ]
    task = next(iter(runs.values())).config["task"]
    title = f"Accuracy of the latest value, {task['symbols']} keys, by pairs written (test split)"
    return Result([Table(title, rows)], accuracies_by_seed(runs))


def _judge(result: Result) -> Verdict:
    far = {label: scores[FAR] for label, scores in result.values.items()}
    mean = {label: sum(values) / len(values) for label, values in far.items()}

    def gains(without: str, forgets: str) -> bool:
        return mean[forgets] - mean[without] > GAIN and min(far[forgets]) > max(far[without])

    gained = {
        f"softmax, {how}": all(gains(name, f"softmax, {how}") for name in ("rotary positions", "neither"))
        for how in ("forgets", "slowly at first")
    } | {f"DeltaFormer, {how}": gains("DeltaFormer", f"DeltaFormer, {how}") for how in ("forgets", "slowly at first")}
    met = ", ".join(name for name, enough in gained.items() if enough) or "none"
    found = ", ".join(f"{label} {spread(values)}" for label, values in far.items())
    room = "" if mean["DeltaFormer"] + GAIN < 1 else " (more than DeltaFormer, which erases, leaves room for)"
    return Verdict(
        grade(*gained.values()),
        f"Needed at {FAR} pairs: a mean more than {percent(GAIN, 0)} above that of each memory without a decay{room}, "
        f"and the worst seed above its best. Met by: {met}. Found: {found}.",
    )


# One colour for what forgets from the start, one for what forgets slowly at first, in all panels.
_COLOURS = ("neither", "forgets", "slowly at first")
STYLES = {
    label: line_style(1 + max((place for place, how in enumerate(_COLOURS) if how in label), default=-1))
    for label in MODELS
}
FORGETTING = Study(
    name="forgetting",
    title="Forgetting where values are overwritten",
    claim="A forget gate carries recall beyond the length of training where values are overwritten: in softmax "
    "attention (the Forgetting Transformer), and in DeltaFormer, although it erases what it writes again.",
    source="arXiv 2503.02130; DeltaFormer, NeurIPS 2025",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="memory",
        points="{} pairs",
        panel="family",
        x="pairs written (trained on 16)",
        y="accuracy",
        level=1 / 8,
        limits=(0, 1.04),
        options={"styles": STYLES, "x_base": 2},
    ),
    caption="Accuracy of the latest value of one of 8 keys, by the number of pairs written; lines: mean of three "
    "seeds, bands: least to greatest. Slowly at first: a head keeps 1/e for 8 tokens at the start of training, another "
    "for 64, where a forget gate keeps a half per token. Neither: no rotary positions and no decay.",
    base={
        "task": {"name": "rewrite", "length": 16, "symbols": 8, "queries": 8},
        "model": {"width": 32, "heads": 2, "depth": 1, "feedforward": None},
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 500, "batch_size": 32, "stop_accuracy": 0.999, "final_batches": 4, "log_every": 25},
        "train.final_lengths": (32, 64, 128),
    },
    rows=ROWS,
    seeds=3,
    quick=Quick(
        {"delta rule": ROWS["delta rule"]},
        {
            "task.length": 4,
            "task.symbols": 4,
            "task.queries": 4,
            "model.width": 16,
            "train.steps": 150,
            "train.final_lengths": (8,),
        },
    ),
)
