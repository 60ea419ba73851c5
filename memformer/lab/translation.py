"""Translation of held-out verses by beam search: BLEU by the source's length, and alignments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from memformer.lab.bleu import measure_bleu
from memformer.lab.plots import Lines, new_figure
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.models.beam import decode
from memformer.tasks.translation import END, START, Translation, VersePair
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun

__all__ = ["TRANSLATION", "group_lengths"]

BEAMS, LENGTH_PENALTY = 4, 0.6
# Rows per batch, and groups of test verses by length.
ROWS, GROUPS = 32, 5
# The alignment is drawn of the first test verse with so many words.
SHOWN = (9, 13)


class Translations(NamedTuple):
    """The test verses as a run's model translates them."""

    name: str
    run: LoadedRun
    texts: list[str]


def group_lengths(lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of lengths, about equally many of the given ones in each.

    Example:
      >>> group_lengths([3, 4, 4, 5, 7, 9], 3)
      [(3, 3), (4, 6), (7, 9)]
    """
    low, high = min(lengths), max(lengths)
    edges = [low]
    for part in range(1, groups):
        edge = int(np.quantile(lengths, part / groups, method="higher"))
        if edge > edges[-1]:
            edges.append(edge)
    # a group begins where the last one ends
    return list(zip(edges, [edge - 1 for edge in edges[1:]] + [high], strict=True))


def _measure(runs: Runs, settings: Settings) -> Result:
    task = _task_of(runs)
    pairs = task.pairs("test")
    found = [Translations(_name(run), run, _translate(run.module(), task, pairs)) for run in runs.values()]
    groups = group_lengths([_size(pair) for pair in pairs], GROUPS)
    values = {
        "verses": task.origin,
        "test verses": len(pairs),
        "beams": BEAMS,
        "length_penalty": LENGTH_PENALTY,
        "sacrebleu": _bleu(found[0].texts, [pair.verse.spanish for pair in pairs]).signature,
    }
    return Result(
        [
            Table("All test verses", [_whole(one, pairs, groups) for one in found]),
            Table(
                f"BLEU of test verses by length of the source, {BEAMS} beams",
                [_row(one, pairs, first, last) for one in found for first, last in groups],
            ),
            Table("The first test verses, translated", _examples_of(found, pairs)),
        ],
        values,
    )


def _task_of(given: Runs) -> Translation:
    runs = list(given.values())
    for run in runs:
        if not isinstance(run.task, Translation):
            raise RunError(f"translation measures runs of configs/translation.py, {run.folder} is of {run.task.name}.")
        if run.task != runs[0].task:
            raise RunError(f"the runs must have one task, but {run.folder} has another than {runs[0].folder}.")
    return cast(Translation, runs[0].task)


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    if model["type"] == "transformer":
        return "Transformer"
    return "LSTM, last state" if model["attention"] == "none" else "LSTM, attention"


def _size(pair: VersePair) -> int:
    return len(pair.source)


def _translate(model: Any, task: Translation, pairs: Sequence[VersePair]) -> list[str]:
    """The best translation of each verse; verses are sorted by length, so that those of a batch end together."""
    source = task.source("test", 0)
    order = sorted(range(len(pairs)), key=lambda i: _size(pairs[i]))
    translations = [""] * len(pairs)
    for first in range(0, len(order), ROWS):
        # the last batch is padded, so that one program serves all
        numbers = [order[min(i, len(order) - 1)] for i in range(first, first + ROWS)]
        batch = [source[i] for i in numbers]
        tokens, _ = decode(
            model,
            start=START,
            end=END,
            beams=BEAMS,
            max_steps=task.length,
            length_penalty=LENGTH_PENALTY,
            source=np.stack([one["source"] for one in batch]),
            source_segment_ids=np.stack([one["source_segment_ids"] for one in batch]),
        )
        for number, row in zip(numbers, tokens[:, 0], strict=True):
            translations[number] = task.decode(row)
    return translations


def _bleu(translations: Sequence[str], references: Sequence[str]) -> Any:
    found = measure_bleu(translations, references)
    if found is None:
        raise RunError("translation needs sacrebleu: pip install sacrebleu.")
    return found


def _row(one: Translations, pairs: Sequence[VersePair], first: int, last: int) -> Row:
    chosen = [i for i, pair in enumerate(pairs) if first <= _size(pair) <= last]
    texts, references = [one.texts[i] for i in chosen], [pairs[i].verse.spanish for i in chosen]
    return {
        "model": one.name,
        "source tokens": f"{first}-{last}",
        "mean source tokens": round(float(np.mean([_size(pairs[i]) for i in chosen])), 1),
        "verses": len(chosen),
        "BLEU": round(_bleu(texts, references).score, 2),
        "length / reference": round(_words(texts) / _words(references), 3),
    }


def _words(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _whole(one: Translations, pairs: Sequence[VersePair], groups: Sequence[tuple[int, int]]) -> Row:
    row = _row(one, pairs, groups[0][0], groups[-1][1])
    lengths: dict[str, Any] = (one.run.result or {}).get("lengths", {})
    scores: dict[str, Any] = next(iter(lengths.values()), {})
    return {
        "model": one.name,
        "parameters": one.run.model.size(),
        "steps": one.run.step,
        "perplexity per token": round(scores["perplexity"], 2) if scores else "",
        "BLEU": row["BLEU"],
        "length / reference": row["length / reference"],
    }


def _examples_of(found: Sequence[Translations], pairs: Sequence[VersePair], count: int = 3) -> list[Row]:
    chosen = _choose(pairs, count)
    rows = []
    for i in chosen:
        rows += [{"verse": pairs[i].verse.english, "translation by": "Reina-Valera", "text": pairs[i].verse.spanish}]
        rows += [{"verse": "", "translation by": one.name, "text": one.texts[i]} for one in found]
    return rows


def _choose(pairs: Sequence[VersePair], count: int) -> list[int]:
    """Numbers of the first test verses of `SHOWN` words, padded with others where there are too few."""
    fitting = [i for i, pair in enumerate(pairs) if SHOWN[0] <= len(pair.verse.english.split()) <= SHOWN[1]]
    return (fitting + [i for i in range(len(pairs)) if i not in fitting])[:count]


def _judge(result: Result) -> Verdict:
    found = {row["model"]: [r["BLEU"] for r in result.rows(1, model=row["model"])] for row in result.rows()}
    kept = {name: scores[-1] / scores[0] for name, scores in found.items()}
    attends = {name: share for name, share in kept.items() if name != "LSTM, last state"}
    falls = kept.get("LSTM, last state", 1.0) < min(attends.values(), default=0.0)
    steady = [share > 0.9 for share in attends.values()]
    scores = "; ".join(f"{name} {bleu[0]:.1f} to {bleu[-1]:.1f}" for name, bleu in found.items())
    return Verdict(
        grade(falls and any(steady), all(steady)), f"BLEU from the shortest to the longest verses: {scores}."
    )


def _examples(runs: Runs) -> Mapping[str, Any]:
    """Attention over one verse, its true translation given; of a Transformer the last block, mean over its heads."""
    looking = [run for run in runs.values() if run.config["model"].get("attention") != "none"]
    task = _task_of(runs)
    pairs = task.pairs("test")
    if not looking:
        return {}
    number = _choose(pairs, 1)[0]
    one, pair = task.source("test", 0)[number], pairs[number]
    spell = [[task.decode([i]) for i in ids] + ["(end)"] for ids in (pair.source, pair.target)]
    batch = {key: jnp.asarray(one[key][None]) for key in ("inputs", "source", "source_segment_ids", "segment_ids")}
    figure, axes = new_figure(
        1, len(looking), width=0.9 + 0.24 * len(spell[0]) * len(looking), height=1.4 + 0.22 * len(spell[1])
    )
    for axis, run in zip(axes[0], looking, strict=True):
        module: Any = run.module()
        weights = np.asarray(module.alignments(**batch))[0, -1].mean(0)
        weights = weights[: len(spell[1]), : len(spell[0])]
        shown = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(spell[0])), spell[0], rotation=90, fontsize=8)
        axis.set_yticks(range(len(spell[1])), spell[1], fontsize=8)
        axis.set_title(_name(run), fontsize=10)
        axis.set_xlabel("attended token (English)")
    axes[0, 0].set_ylabel("next token (Spanish)")
    figure.colorbar(shown, ax=list(axes[0]), label="attention", fraction=0.03)
    return {"alignment": figure}


TRANSLATION = Study(
    name="translation",
    title="Translation by length",
    claim="A model that must compress the source into one vector translates long sentences worse than short ones; "
    "with attention it does not.",
    source="arXiv 1409.0473, figure 2",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="mean source tokens",
        value="BLEU",
        table=1,
        x="length of the source (byte-pair tokens)",
        y="BLEU",
        limits=(0, 30),
    ),
    caption="BLEU of test verses by the length of the English verse; each point is a group of about equally many "
    "verses. One seed.",
    reads="configs/translation.py",
    examples=_examples,
)
