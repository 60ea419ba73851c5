"""Repeated tokens in text: which memories profit from them, from how far back, and which heads answer.

Where a pair of neighbouring tokens occurs a second time in a document, its second token can be looked up: at the first
occurrence a memory may have stored it under a key that contains the token before. Only pairs that are rare in the
training split ask for a memory; frequent ones are known by heart (arXiv 2312.04927, section 3).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from memformer.data.source import RandomAccessSource
from memformer.evals.positions import DistanceLoss
from memformer.lab.inside import initial_model, test_batch
from memformer.lab.language import LANGUAGE, SMALLER, kept_distances, kept_positions, mean_loss
from memformer.lab.plots import DOTTED, draw_lines, line_style, new_figure
from memformer.lab.snr_trained import Head, Questions, ask_head, heads_of, key_cosine
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.training.evaluation import LoadedRun
from memformer.training.metrics import log

__all__ = ["REPEATS", "HeadScores", "Repeats", "count_pairs", "find_repeats", "head_scores", "pair_losses"]

# The model that others are compared with: it has the delta rules' convolution, and keeps all keys.
ATTENTION = "softmax attention"
ROWS: Mapping[str, Row] = {
    ATTENTION: {
        **LANGUAGE.rows["softmax attention"],
        "model.memory_options": {"softmax_attention": {"rotary": True, "conv_width": 4}},
    },
    "gated delta rule": LANGUAGE.rows["gated delta rule"],
}
# Tokens since the last occurrence: "near" up to the first number, "far" from the second on.
NEAR, FAR = 15, 64
REACHES = {"near": (1, NEAR), "between": (NEAR + 1, FAR - 1), "far": (FAR, math.inf)}
# Nats by which the lag of a fixed state must grow from near to far.
GROWTH = 0.03
# Greatest 1 / SNR in the figure: a head that has forgotten the pair has any.
CLIP = 1e6


class Repeats(NamedTuple):
    """Repeated pairs of a batch, M of them.

    Attributes:
      rows: [M], rows of the batch.
      asked: [M], places of the first token of each pair, whose target is the second.
      answered: [M], places of the second token where the pair last occurred before.
    """

    rows: np.ndarray
    asked: np.ndarray
    answered: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """[M], tokens from the last occurrence of the second token in such a pair to this one."""
        return self.asked + 1 - self.answered


def count_pairs(source: RandomAccessSource) -> Mapping[tuple[int, int], int]:
    """Counts of the pairs of input and target in the examples of a source."""
    ids = [np.stack([source[i]["inputs"], source[i]["targets"]]) for i in range(len(source))]
    pairs, counts = np.unique(np.concatenate(ids, axis=1), axis=1, return_counts=True)
    return dict(zip(zip(*pairs.tolist(), strict=True), counts.tolist(), strict=True))


def find_repeats(batch: Mapping[str, np.ndarray], counts: Mapping[tuple[int, int], int], most: int) -> Repeats:
    """The pairs that occurred before in their document.

    Args:
      batch: examples of text.
      counts: of pairs in the training split.
      most: pairs that occur there more often are left out.

    Example:
      >>> ids = np.array([[3, 4, 3, 4, 4]])
      >>> batch = {"inputs": ids[:, :4], "targets": ids[:, 1:], "segment_ids": np.ones((1, 4), int)}
      >>> find_repeats(batch, {(3, 4): 2, (4, 3): 1, (4, 4): 1}, 2)
      Repeats(rows=array([0]), asked=array([2]), answered=array([1]))
    """
    found: list[tuple[int, int, int]] = []
    for row, parts in enumerate(zip(batch["inputs"], batch["targets"], batch["segment_ids"], strict=True)):
        last: dict[tuple[int, ...], int] = {}
        for place, (*pair, segment) in enumerate(zip(*(part.tolist() for part in parts), strict=True)):
            if (*pair, segment) in last and counts.get((pair[0], pair[1]), 0) <= most:
                found.append((row, place, last[*pair, segment] + 1))
            last[*pair, segment] = place
    return Repeats(*np.array(found, int).reshape(-1, 3).T)


def pair_losses(model: Any, batch: Mapping[str, np.ndarray], pairs: Repeats, size: int) -> np.ndarray:
    """Loss in nats of the second token of each pair, [M].

    Args:
      model: a language model.
      batch: examples of text.
      pairs: of the batch.
      size: examples that the model reads at once.
    """
    losses = np.zeros(len(pairs.rows))
    for first in range(0, len(batch["inputs"]), size):
        # the last part is as large as the others
        begin = max(min(first, len(batch["inputs"]) - size), 0)
        here = (pairs.rows >= first) & (pairs.rows < first + size)
        packed = {name: batch[name][begin : begin + size] for name in ("segment_ids", "positions")}
        places = pairs.rows[here] - begin, pairs.asked[here]
        logits = np.asarray(_read(model, batch["inputs"][begin : begin + size], packed))[places].astype(np.float64)
        targets = batch["targets"][pairs.rows[here], pairs.asked[here]]
        losses[here] = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(targets)), targets]
    return losses


@nnx.jit
def _read(model: Any, inputs: Any, packed: Mapping[str, Any]) -> Any:
    return model(inputs, **packed).logits


class HeadScores(NamedTuple):
    """One head before or after training.

    Attributes:
      cosine: root mean square of the cosines of its keys.
      half_life: tokens in which its decay halves what is stored, on average; infinite without decay.
      inverse: kind of query of `snr_trained` to 1 / SNR at each question, [M].
    """

    cosine: float
    half_life: float
    inverse: Mapping[str, np.ndarray]


def head_scores(run: LoadedRun, batch: Mapping[str, np.ndarray], pairs: Repeats) -> dict[str, list[HeadScores]]:
    """The heads of all layers in order, at the "start" and "trained", asked for the second token of each pair."""

    def score(head: Head) -> HeadScores:
        rate = 0.0 if head.decays is None else -float(np.diff(head.decays, axis=1).mean())
        half_life = math.log(2) / rate if rate else math.inf
        return HeadScores(key_cosine(head), half_life, ask_head(head, Questions(*pairs)))

    models = {"start": initial_model(run), "trained": run.module()}
    return {stage: [score(head) for head in heads_of(model, batch)] for stage, model in models.items()}


def _measure(runs: Runs, settings: Settings) -> Result:
    one = next(iter(runs.values()))
    seed, batches = one.config["seed"], settings["scored_batches"]
    batch = test_batch(one, min(settings["pair_examples"], len(one.task.source("test", seed))))
    pairs = find_repeats(batch, count_pairs(one.task.source("train", seed)), settings["rare"])
    distances = {label: kept_distances(run, batches) for label, run in runs.items()}
    base = distances.get(ATTENTION) or next(iter(distances.values()))
    models, rare, heads, inverse = [], [], [], {}
    for label, run in runs.items():
        found = distances[label]
        lags = {f"lag, {reach}": round(_lag(found, base, *REACHES[reach]), 4) for reach in ("near", "far")}
        loss = mean_loss(found)
        bits = loss / math.log(2) / run.task.bytes_per_step("test")
        models.append({"model": label, "bits per byte": round(bits, 4), "loss per token": round(loss, 4), **lags})
        # the same pairs where they occurred before: what a model loses without looking them up
        before = pairs._replace(asked=pairs.answered - 1)
        again, once = (
            pair_losses(run.module(), batch, each, run.config["train"]["batch_size"]) for each in (pairs, before)
        )
        rare.append({"model": label, **_by_reach(pairs, again), "the time before": round(float(once.mean()), 4)})
        row, inverse[label] = _heads_row(label, run, batch, pairs, settings["head_examples"])
        heads.append(row)
        log(f"{label}: measured")
    contexts = [
        {"model": label, **{str(part.last + 1): round(part.loss, 4) for part in kept_positions(run, batches)}}
        for label, run in runs.items()
    ]
    by_distance = [
        {"model": label, **{str(part.last or "none"): round(part.loss, 4) for part in found}}
        for label, found in distances.items()
    ]
    counted = {"model": "(tokens)", **{str(part.last or "none"): part.tokens for part in base}}
    values = {
        "training tokens": one.step * one.config["train"]["batch_size"] * one.task.length,
        "1/SNR": inverse,
        "rare": settings["rare"],
    }
    return Result(
        [
            Table("Test split, and the lag in nats behind softmax attention by the last occurrence", models),
            Table(
                "Test loss per token, by the distance of its last occurrence up to the number", [*by_distance, counted]
            ),
            Table("Test loss of the second token of rare repeated pairs, by the distance of the last, and there", rare),
            Table("1 / SNR of heads at rare repeated pairs, medians over questions; start to trained", heads),
            Table("Test loss per token, by the tokens of context up to the number", contexts),
        ],
        values,
    )


def _lag(found: Sequence[DistanceLoss], base: Sequence[DistanceLoss], low: float, high: float) -> float:
    """Mean loss in a range of distances minus that of another model, in nats."""
    inside = [(one, other) for one, other in zip(found, base, strict=True) if low <= one.first and one.last <= high]
    tokens = sum(one.tokens for one, _ in inside)
    return sum(one.tokens * (one.loss - other.loss) for one, other in inside) / max(tokens, 1)


def _by_reach(pairs: Repeats, losses: np.ndarray) -> dict[str, float]:
    """Mean losses; the heading has the distances and the number of pairs."""
    found = {}
    for low, high in REACHES.values():
        inside = (low <= pairs.distances) & (pairs.distances <= high)
        name = f"{low} on" if math.isinf(high) else f"{low} to {high}"
        if inside.any():
            found[f"{name} ({inside.sum()} pairs)"] = round(float(losses[inside].mean()), 4)
    return found


def _heads_row(
    label: str, run: LoadedRun, batch: Mapping[str, np.ndarray], pairs: Repeats, examples: int
) -> tuple[Row, dict[str, list[float]]]:
    """(row of the table, stage to the median 1 / SNR of each head at the pairs)."""
    few = pairs.rows < examples
    pairs = Repeats(*(part[few] for part in pairs))
    stages = head_scores(run, {name: part[:examples] for name, part in batch.items()}, pairs)

    def medians(stage: str, way: str, where: Any = slice(None)) -> list[float]:
        return [float(np.median(head.inverse[way][where])) for head in stages[stage]]

    def both(value: Any) -> str:
        return f"{value('start'):.2g} to {value('trained'):.2g}"

    far = pairs.distances >= (FAR if (pairs.distances >= FAR).any() else 0)
    trained, heads = medians("trained", "target pair"), run.config["model"]["heads"]
    best = int(np.argmin(trained))
    row = {
        "model": label,
        "questions": len(pairs.rows),
        "cosine of keys": both(lambda stage: np.mean([head.cosine for head in stages[stage]])),
        "half-life in tokens (trained, range)": _half_lives(stages),
        "stored key": both(lambda stage: np.median(medians(stage, "stored key"))),
        "own query": both(lambda stage: np.median(medians(stage, "own query"))),
        "pair, best head": both(lambda stage: min(medians(stage, "target pair"))),
        f"pair {FAR} on, best head": both(lambda stage: min(medians(stage, "target pair", far))),
        "best head (layer.head)": f"{best // heads + 1}.{best % heads + 1}",
        "heads below 1": f"{sum(value < 1 for value in trained)} of {len(trained)}",
    }
    return row, {
        stage: [float(f"{value:.4g}") for value in medians(stage, "target pair")] for stage in ("start", "trained")
    }


def _half_lives(stages: Mapping[str, Sequence[HeadScores]]) -> str:
    start, trained = (sorted(head.half_life for head in stages[stage]) for stage in ("start", "trained"))
    if math.isinf(trained[0]):
        return ""
    middle = len(trained) // 2
    return f"{start[middle]:.2g} to {trained[middle]:.2g} ({trained[0]:.2g} to {trained[-1]:.2g})"


def _judge(result: Result) -> Verdict:
    growth = {row["model"]: row["lag, far"] - row["lag, near"] for row in result.rows()}
    states = [name for name in growth if name != ATTENTION]
    best = {label: min(stages["trained"]) for label, stages in result.values["1/SNR"].items()}
    scores = ", ".join(f"{row['model']} {row['bits per byte']:.3f}" for row in result.rows())
    lags = ", ".join(
        f"{row['model']} {row['lag, near']:+.3f} and {row['lag, far']:+.3f}"
        for row in result.rows()
        if row["model"] in states
    )
    heads = ", ".join(f"{name} {value:.2g}" for name, value in best.items())
    return Verdict(
        grade(*(growth[name] >= GROWTH for name in states), max(best.values()) < 1),
        f"Bits per byte: {scores}. Nats per token behind softmax attention where a token last occurred at most {NEAR} "
        f"and at least {FAR} tokens before: {lags}. Least median 1/SNR of a head at rare repeated pairs: {heads}.",
    )


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 3, width=11.0, height=3.9)
    rows = {row["model"]: {n: row[n] for n in row if n != "model"} for row in result.rows(1)}
    counted = rows.pop("(tokens)")
    base = rows.get(ATTENTION) or next(iter(rows.values()))
    styles = {label: line_style(place) for place, label in enumerate(rows)}
    places = {name: 0.5 if name == "none" else int(name) for name in counted}
    losses = {label: {places[n]: row[n] for n in row} for label, row in rows.items()}
    lags = {label: {places[n]: row[n] - base[n] for n in row} for label, row in rows.items()}
    for axis, series, title in (
        (axes[0, 0], losses, "test loss per token (nats)"),
        (axes[0, 1], lags, "nats behind softmax attention"),
    ):
        draw_lines(axis, series, styles=styles, x_base=2)
        axis.set_xticks(list(places.values()), list(places), fontsize="small")
        axis.set_xlabel("tokens since the last occurrence")
        axis.set_ylabel(title)
    axis = axes[0, 2]
    trained = {label: sorted(stages["trained"]) for label, stages in result.values["1/SNR"].items()}
    series = {
        label: dict(enumerate(np.clip(values, 1e-3, CLIP).tolist(), start=1)) for label, values in trained.items()
    }
    draw_lines(axis, series, styles=styles, y_scale="log")
    axis.axhline(1, **DOTTED)
    axis.set_xlabel("heads of the model, the best first")
    axis.set_ylabel(f"1 / SNR at rare repeated pairs, at most {CLIP:g}")
    return figure


REPEATS = Study(
    name="repeats",
    title="Language models: repeated tokens",
    claim="A state of fixed size falls behind attention the farther back a token last occurred, for it holds about as "
    "many pairs as a key has channels (64 here); and a model that looks up repeated pairs of tokens has heads that "
    "answer with a signal above their noise (1/SNR below 1).",
    source="arXiv 2505.19488, section 2; arXiv 2312.04927, section 3, for repeated pairs",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Models of 10M parameters, all with a convolution over four tokens, after one epoch of the World English "
    "Bible. Left: test loss by the distance of a token's last occurrence in its document. Middle: the same, less that "
    "of softmax attention. Right: each head's median 1/SNR where a rare pair of tokens is repeated.",
    # one epoch: 4,320 of the 4,324 windows of the training chapters
    base={
        **LANGUAGE.base,
        "optimizer.learning_rate": 2e-3,
        "optimizer.warmup_steps": 50,
        "train.steps": 1080,
        "train.log_every": 20,
        "train.checkpoint_every": 120,
    },
    prepare=LANGUAGE.prepare,
    rows=ROWS,
    settings={
        "corpus": LANGUAGE.settings["corpus"],
        "vocab_size": LANGUAGE.settings["vocab_size"],
        # the whole test split
        "scored_batches": 0,
        "pair_examples": 252,
        "head_examples": 64,
        # most occurrences of a rare pair in the training split
        "rare": 20,
    },
    quick=Quick(
        {"gated delta rule": ROWS["gated delta rule"]},
        SMALLER,
        {
            "corpus": "Genesis 1 to 20",
            "vocab_size": 0,
            "scored_batches": 2,
            "pair_examples": 8,
            "head_examples": 4,
            "rare": 100_000,
        },
    ),
)
