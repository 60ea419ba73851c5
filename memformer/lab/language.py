"""Language models of about 10 million parameters, one per memory, on the World English Bible (docs/language.md).

All models have the same width and depth; the feedforward layers fill up to the same number of parameters. Each is
trained once on the same examples in the same order, and no token is read twice.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from memformer.data.corpus import wrap_source
from memformer.data.tokenization import tokenize_corpus, training_texts
from memformer.data.tokenizer import TOKENIZER_FILE, train_tokenizer
from memformer.data.verses import CHAPTERS_PACKAGE, find_chapters, read_chapters, read_verse_slice
from memformer.evals.positions import DistanceLoss, PositionLoss, evaluate_distances, evaluate_positions
from memformer.lab.plots import draw_lines, new_figure
from memformer.lab.runs import training_records
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.models.generate import TokenStream
from memformer.models.generate_text import generate_text
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.input import batch_shapes, make_loader
from memformer.training.metrics import log
from memformer.training.sharding import batch_layout, mesh_scope
from memformer.training.step import init_state, make_train_step

__all__ = ["LANGUAGE", "SMALLER", "kept_distances", "kept_positions", "mean_loss", "time_steps"]

CAPACITIES = (256, 4096)


def _row(memory: str, hidden: int) -> Row:
    return {"model.memory": memory, "model.feedforward_options": {"hidden": hidden}}


# The hidden width of the feedforward layer brings each model to 10.4 to 10.5 million parameters.
ROWS: Mapping[str, Row] = {
    "softmax attention": _row("softmax_attention", 1088),
    "gated delta rule": _row("gated_delta_rule", 928),
    "KDA": _row("kda", 928),
    "delta rule": _row("delta_rule", 1056),
    "DeltaFormer": _row("deltaformer", 1088),
    "hybrid 3 to 1": _row("gated_delta_rule,gated_delta_rule,gated_delta_rule,softmax_attention", 960),
    "LSTM": _row("lstm", 448),
}
SMALLER: Row = {
    "task.length": 16,
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 1,
    "model.feedforward": None,
    "model.feedforward_options": {},
    "train.steps": 4,
    "train.log_every": 1,
    "train.final_batches": 2,
}
# As softmax attention, with the write in addition.
DELTAFORMER = {"write_kernel": "softmax", "read_kernel": "softmax", "unit_keys": False, "rotary": True}


def _prepare(folder: str, settings: Settings) -> Row:
    """Trains the tokenizer on the training chapters and writes the token store."""
    corpus = wrap_source(_texts(settings["corpus"]), name=settings["corpus"])
    tokenizer = "bytes"
    if settings["vocab_size"]:
        tokenizer = os.path.join(folder, "tokenizer")
        if not os.path.exists(os.path.join(tokenizer, TOKENIZER_FILE)):
            train_tokenizer(training_texts(corpus), tokenizer, vocab_size=settings["vocab_size"])
    store = tokenize_corpus(corpus, os.path.join(folder, "tokens"), tokenizer=tokenizer)
    log(store.summary())
    return {"data.path": str(store.path)}


def _texts(corpus: str) -> Sequence[str]:
    if corpus == "Genesis 1 to 20":
        return [verse.english for verse in read_verse_slice()]
    folder = find_chapters()
    if folder is None:
        raise RunError(
            f"language reads the World English Bible of the Debian package {CHAPTERS_PACKAGE}, which is not installed: "
            f"apt-get install {CHAPTERS_PACKAGE}, or set SWORD_PATH to the folder that holds its modules. "
            "With --quick the study reads twenty chapters that are part of memformer."
        )
    return read_chapters(folder)


def _measure(runs: Runs, settings: Settings) -> Result:
    speeds = time_steps(runs, settings["timed_steps"])
    models, contexts, samples = [], [], []
    for label, run in runs.items():
        module, positions = run.module(), kept_positions(run, settings["scored_batches"])
        sizes = {f"state bytes at {n} tokens": f"{_state_bytes(module, n):,}" for n in CAPACITIES}
        loss = mean_loss(positions)
        models.append(
            {
                "model": label,
                "bits per byte": round(loss / math.log(2) / run.task.bytes_per_step("test"), 4),
                "perplexity per token": round(math.exp(loss), 2),
                "training tokens per CPU second": round(speeds[label]),
                **sizes,
            }
        )
        contexts.append({"model": label, **{str(part.last + 1): round(part.loss, 4) for part in positions}})
        samples.append({"model": label, "text": _sample(module, run, settings)})
        log(f"{label}: measured")
    one = next(iter(runs.values()))
    values = {
        "curves": {label: _curve(run) for label, run in runs.items()},
        "training tokens": one.step * one.config["train"]["batch_size"] * one.task.length,
        **{name: settings[name] for name in ("corpus", "scored_batches", "timed_steps", "prompt", "sampled")},
    }
    written = f"{settings['sampled']} tokens at temperature 0.8, seed 0; a slash ends a verse"
    return Result(
        [
            Table("Test split", models),
            Table("Test loss per token in nats, by the tokens of context up to the number", contexts),
            Table(written, samples),
        ],
        values,
    )


def kept_positions(run: LoadedRun, batches: int) -> list[PositionLoss]:
    """Loss by position on the test split, which the run's folder keeps as eval.py --by_position does."""
    return [PositionLoss(**part) for part in _kept("positions", evaluate_positions, run, batches)]


def kept_distances(run: LoadedRun, batches: int) -> list[DistanceLoss]:
    """Loss by distance on the test split, which the run's folder keeps as eval.py --by_distance does."""
    return [DistanceLoss(**part) for part in _kept("distances", evaluate_distances, run, batches)]


def mean_loss(parts: Sequence[PositionLoss | DistanceLoss]) -> float:
    """Loss per token over all ranges, in nats."""
    return sum(part.tokens * part.loss for part in parts) / sum(part.tokens for part in parts)


def _kept(name: str, evaluate: Callable[..., Any], run: LoadedRun, batches: int) -> list[dict[str, Any]]:
    path = os.path.join(run.folder, f"{name}_test.json")
    if not os.path.exists(path):
        evaluate(run.folder, batches=batches)
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if found["step"] != run.step:
        raise RunError(f"{path} is of step {found['step']} and the run is at step {run.step}: delete the file.")
    return found[name]


def _sample(module: Any, run: LoadedRun, settings: Settings) -> str:
    prompt, count = settings["prompt"], settings["sampled"]
    task: Any = run.task
    written = generate_text(module, task.tokenizer(), prompt, max_new_tokens=count, temperature=0.8)
    return (prompt + written.texts[0]).replace("\n", " / ")


def _state_bytes(module: Any, capacity: int) -> int:
    """Bytes per sequence of the state with room for so many tokens."""
    return TokenStream(module, [[0]], max_new_tokens=1, capacity=capacity).state_bytes


def _curve(run: LoadedRun) -> dict[int, float]:
    """Tokens read to the bits per byte of the steps before: those of text that the model had not read yet."""
    records = training_records(run)
    tokens = run.config["train"]["batch_size"] * run.task.length
    return {record["step"] * tokens: round(record["bits_per_byte"], 4) for record in records}


def time_steps(runs: Runs, count: int) -> dict[str, float]:
    """Tokens per second of processor time of a training step, from the fastest of `count` steps of each run.

    Processor time, of all threads, is what a quiet machine with one core would take: what else the machine does hardly
    changes it. The runs take turns all the same.
    """
    states: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for label, run in runs.items():
        parts, size = run.run, run.config["train"]["batch_size"]
        layout = batch_layout(batch_shapes(run.task, size), parts.mesh)
        loader = make_loader(run.task, "train", batch_size=size, seed=0, rows=layout.rows, place=layout.place)
        batch = next(loader)
        loader.close()
        with mesh_scope(parts.mesh):
            state = init_state(parts.model, parts.tx, parts.mesh, seed=0)
            step = make_train_step(parts.model, parts.tx, parts.schedule, parts.mesh, run.config["train"])
            # the first call compiles
            states[label] = jax.block_until_ready(step(state, batch)[0])
        steps[label] = (step, batch)
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(count):
        for label, (step, batch) in steps.items():
            with mesh_scope(runs[label].run.mesh):
                started = time.process_time()
                states[label] = jax.block_until_ready(step(states[label], batch)[0])
                seconds[label] = min(seconds[label], time.process_time() - started)
    return {label: steps[label][1]["inputs"].size / least for label, least in seconds.items()}


def _judge(result: Result) -> Verdict:
    found = {row["model"]: row["bits per byte"] for row in result.rows()}
    softmax, gated = found["softmax attention"], found["gated delta rule"]
    hybrid = found.get("hybrid 3 to 1", math.inf)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in sorted(found.items(), key=lambda item: item[1]))
    missing = "; the hybrid has not been trained" if math.isinf(hybrid) else ""
    return Verdict(
        grade(gated < softmax, hybrid < min(gated, softmax)),
        f"Bits per byte of the test split: {scores} (one seed){missing}.",
    )


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 2, width=8.8, height=3.8)
    left, right = axes[0]
    plain = {label: {"marker": ""} for label in result.values["curves"]}
    curves = {label: _smooth(points) for label, points in result.values["curves"].items()}
    draw_lines(left, curves, styles=plain)
    left.set_xlabel("training tokens read")
    left.set_ylabel("bits per byte of the next tokens")
    by_context = {row["model"]: {int(n): row[n] for n in row if n != "model"} for row in result.rows(1)}
    draw_lines(right, by_context, x_base=2)
    right.set_xlabel("tokens of context")
    right.set_ylabel("test loss per token (nats)")
    return figure


def _smooth(points: Mapping[Any, float], width: int = 4) -> dict[int, float]:
    """Means of `width` neighbouring points, each at the last of them."""
    tokens, values = [int(n) for n in points], list(points.values())
    return {tokens[i]: sum(values[i - width + 1 : i + 1]) / width for i in range(width - 1, len(values))}


LANGUAGE = Study(
    name="language",
    title="Language models of seven memories",
    claim="At equal parameters and tokens the gated delta rule predicts text better than softmax attention, and a "
    "hybrid of three such layers to one of softmax attention better than either.",
    source="arXiv 2412.06464, table 3; arXiv 2510.26692, for KDA",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Left: bits per byte of the training text, each token read once, before it was learnt from. Right: loss "
    "on the test split by the tokens of context that a model has. One seed; docs/language.md has the samples.",
    base={
        "task": {"name": "lm", "length": 256},
        "model": {"width": 384, "depth": 4, "heads": 6},
        "model.memory_options": {"softmax_attention": {"rotary": True}, "deltaformer": DELTAFORMER},
        "optimizer": {
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 12,
            "end_factor": 0.0,
            "b2": 0.95,
            "weight_decay": 0.1,
        },
        # the test split is scored below, by position
        "train": {"steps": 120, "batch_size": 4, "log_every": 5, "checkpoint_every": 30, "final_batches": 1},
    },
    prepare=_prepare,
    rows=ROWS,
    settings={
        "corpus": "World English Bible",
        "vocab_size": 4096,
        # 8,192 tokens of the 64,509 of the test split
        "scored_batches": 8,
        "timed_steps": 3,
        "prompt": "In the beginning",
        "sampled": 60,
    },
    quick=Quick(
        {label: ROWS[label] for label in ("softmax attention", "LSTM")},
        SMALLER,
        {"corpus": "Genesis 1 to 20", "vocab_size": 0, "scored_batches": 2, "timed_steps": 1, "sampled": 3},
    ),
)
