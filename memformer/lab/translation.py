"""Translations of held-out verses by beam search: BLEU by the source's length, and what the models look at."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memformer.lab.bleu import measure_bleu
from memformer.lab.study import Study, new_figure
from memformer.models.beam import decode
from memformer.tasks.translation import END, START, Translation, VersePair
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["group_lengths", "measure"]

BEAMS, LENGTH_PENALTY = 4, 0.6
# Rows a batch, and groups of test verses by length.
ROWS, GROUPS = 32, 5
# The verse of the alignment plots is the first test verse with so many words.
SHOWN = (9, 13)


class Told(NamedTuple):
    """What a run's model makes of the test verses."""

    name: str
    run: LoadedRun
    said: list[str]


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


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Translates the test verses with each run of configs/translation.py.

    Raises:
      RunError: a run of another task, runs that differ in it, or no sacrebleu.
    """
    task = _task_of(runs)
    pairs = task.pairs("test")
    told = [Told(_name(run), run, _translate(run.module(), task, pairs)) for run in runs]
    groups = group_lengths([_size(pair) for pair in pairs], GROUPS)
    rows = [_row(one, pairs, first, last) for one in told for first, last in groups]
    study.add_table(f"BLEU of test verses by length of the source, {BEAMS} beams", rows)
    whole = [_whole(one, pairs, groups) for one in told]
    study.add_table("All test verses", whole)
    study.add_table("The first test verses, as the models say them", _examples(told, pairs))
    _draw_bleu(study, told, rows)
    _draw_alignments(study, told, task, pairs)
    study.values = {
        "verses": task.origin,
        "test verses": len(pairs),
        "beams": BEAMS,
        "length_penalty": LENGTH_PENALTY,
        "sacrebleu": _bleu(told[0].said, [pair.verse.spanish for pair in pairs]).signature,
    }
    study.claim = (
        "A model that must put the source into one vector translates long sentences worse than short ones; attention "
        "does not (1409.0473, figure 2)."
    )
    study.outcome = _outcome(told, rows, whole, task)


def _task_of(runs: Sequence[LoadedRun]) -> Translation:
    for run in runs:
        if not isinstance(run.task, Translation):
            raise RunError(f"translation measures runs of configs/translation.py, {run.folder} is of {run.task.name}.")
        if run.task != runs[0].task:
            raise RunError(f"the runs must have one task, but {run.folder} has another than {runs[0].folder}.")
    task = runs[0].task
    if not isinstance(task, Translation):
        raise RunError("translation needs at least one run of configs/translation.py.")
    return task


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    if model["type"] == "transformer":
        return "Transformer"
    return "LSTM, last state" if model["attention"] == "none" else "LSTM, attention"


def _size(pair: VersePair) -> int:
    return len(pair.source)


def _translate(model: Any, task: Translation, pairs: Sequence[VersePair]) -> list[str]:
    """The best translation of each verse; verses are taken by length, so that a batch is done at once."""
    source = task.source("test", 0)
    order = sorted(range(len(pairs)), key=lambda i: _size(pairs[i]))
    said = [""] * len(pairs)
    for first in range(0, len(order), ROWS):
        # the last batch is filled up, so that one program serves all
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
            said[number] = task.decode(row)
    return said


def _bleu(said: Sequence[str], wanted: Sequence[str]) -> Any:
    found = measure_bleu(said, wanted)
    if found is None:
        raise RunError("translation needs sacrebleu: pip install sacrebleu.")
    return found


def _row(told: Told, pairs: Sequence[VersePair], first: int, last: int) -> dict[str, Any]:
    chosen = [i for i, pair in enumerate(pairs) if first <= _size(pair) <= last]
    said, wanted = [told.said[i] for i in chosen], [pairs[i].verse.spanish for i in chosen]
    return {
        "model": told.name,
        "source tokens": f"{first}-{last}",
        "mean source tokens": round(float(np.mean([_size(pairs[i]) for i in chosen])), 1),
        "verses": len(chosen),
        "BLEU": round(_bleu(said, wanted).score, 2),
        "length of said / wanted": round(_words(said) / _words(wanted), 3),
    }


def _words(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _whole(told: Told, pairs: Sequence[VersePair], groups: Sequence[tuple[int, int]]) -> dict[str, Any]:
    row = _row(told, pairs, groups[0][0], groups[-1][1])
    lengths: dict[str, Any] = (told.run.result or {}).get("lengths", {})
    scores: dict[str, Any] = next(iter(lengths.values()), {})
    return {
        "model": told.name,
        "parameters": told.run.model.size(),
        "steps": told.run.step,
        "perplexity a token": round(scores["perplexity"], 2) if scores else "",
        "BLEU": row["BLEU"],
        "length of said / wanted": row["length of said / wanted"],
    }


def _examples(told: Sequence[Told], pairs: Sequence[VersePair], count: int = 3) -> list[dict[str, Any]]:
    chosen = _choose(pairs, count)
    rows = []
    for i in chosen:
        rows += [{"verse": pairs[i].verse.english, "who": "Reina-Valera", "says": pairs[i].verse.spanish}]
        rows += [{"verse": "", "who": one.name, "says": one.said[i]} for one in told]
    return rows


def _choose(pairs: Sequence[VersePair], count: int) -> list[int]:
    """Numbers of the first test verses of `SHOWN` words, of any verses where there are too few."""
    fitting = [i for i, pair in enumerate(pairs) if SHOWN[0] <= len(pair.verse.english.split()) <= SHOWN[1]]
    return (fitting + [i for i in range(len(pairs)) if i not in fitting])[:count]


def _draw_bleu(study: Study, told: Sequence[Told], rows: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = new_figure(width=6.4, height=3.6)
    axis = axes[0, 0]
    axis.grid(True, color="0.9")
    for one, colour, mark in zip(told, _cycle(COLOURS, told), _cycle("osD", told), strict=True):
        points = [(row["mean source tokens"], row["BLEU"]) for row in rows if row["model"] == one.name]
        axis.plot(*zip(*points, strict=True), f"{mark}-", color=colour, label=one.name, linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("length of the source (byte pairs)")
    axis.set_ylabel("BLEU")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    study.save_figure(
        figure,
        "bleu",
        "BLEU of test verses against the length of the English verse, each point a group of about equally many "
        "verses. Claim: the line of the last state falls with length, those of attention do not.",
    )


def _cycle(values: Sequence[str], like: Sequence[Any]) -> list[str]:
    return [values[i % len(values)] for i in range(len(like))]


def _draw_alignments(study: Study, told: Sequence[Told], task: Translation, pairs: Sequence[VersePair]) -> None:
    """One verse, its true translation given: where each model looks for each token."""
    looking = [one for one in told if one.run.config["model"].get("attention") != "none"]
    if not looking:
        return
    number = _choose(pairs, 1)[0]
    one, pair = task.source("test", 0)[number], pairs[number]
    spell = [[task.decode([i]) for i in ids] + ["(end)"] for ids in (pair.source, pair.target)]
    batch = {key: jnp.asarray(one[key][None]) for key in ("inputs", "source", "source_segment_ids", "segment_ids")}
    figure, axes = new_figure(
        1, len(looking), width=0.9 + 0.24 * len(spell[0]) * len(looking), height=1.4 + 0.22 * len(spell[1])
    )
    for axis, model in zip(axes[0], looking, strict=True):
        # of a Transformer the last block, the mean over its heads
        module: Any = model.run.module()
        weights = np.asarray(module.alignments(**batch))[0, -1].mean(0)
        weights = weights[: len(spell[1]), : len(spell[0])]
        shown = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(spell[0])), spell[0], rotation=90, fontsize=8)
        axis.set_yticks(range(len(spell[1])), spell[1], fontsize=8)
        axis.set_title(model.name, fontsize=10)
        axis.set_xlabel("English token that is looked at")
    axes[0, 0].set_ylabel("Spanish token that comes next")
    figure.colorbar(shown, ax=list(axes[0]), label="attention", fraction=0.03)
    study.save_figure(
        figure,
        "alignment",
        f"Attention over a test verse while its true translation is asked for token by token (a Transformer's: last "
        f"block, mean of {_heads(looking)} heads). Claim: dark cells join a word and its translation, near the "
        "diagonal.",
    )


def _heads(told: Sequence[Told]) -> int:
    return max(one.run.config["model"].get("heads", 1) for one in told)


def _outcome(
    told: Sequence[Told], rows: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]], task: Translation
) -> str:
    parts = []
    for one, row in zip(told, whole, strict=True):
        of = [r for r in rows if r["model"] == one.name]
        parts.append(
            f"{one.name}: BLEU {of[0]['BLEU']:.1f} at {of[0]['source tokens']} tokens, {of[-1]['BLEU']:.1f} at "
            f"{of[-1]['source tokens']}, {row['BLEU']:.1f} in all"
        )
    return "; ".join(parts) + f" ({task.origin}, those of at most {task.length - 1} tokens)."
