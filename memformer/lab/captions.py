"""Captions of held-out pictures by beam search, and where the attention lies while each word is said."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.data import shapes, stamps
from memformer.lab.bleu import measure_bleu
from memformer.lab.study import Study, new_figure
from memformer.models.beam import decode
from memformer.models.captioner import Captioner
from memformer.tasks import Captions
from memformer.tasks.captions import END, START
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.losses import count_batch
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["Told", "measure", "region_shares", "right_words"]

BEAMS = 4
# Pictures of an endless split, and rows a batch.
PICTURES, ROWS = 512, 64


class Told(NamedTuple):
    """What a model made of a split's pictures.

    Attributes:
      said: words of the best caption of beam search, for each picture.
      wanted: words of the true caption.
      loss: of the true captions' scored words, in nats a word.
      maps: [N, T, R, C], the attention when each word of the true caption is asked for.
    """

    said: list[list[str]]
    wanted: list[list[str]]
    loss: float
    maps: np.ndarray


def right_words(said: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """(words that stand where the true caption has them, words of the longer of the two).

    Example:
      >>> right_words(["a", "red", "ring"], ["a", "blue", "ring", "above", "it"])
      (2, 5)
    """
    return sum(a == b for a, b in zip(said, wanted, strict=False)), max(len(said), len(wanted))


def region_shares(maps: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, float]:
    """Attention on the cells of a grid that a region touches, and those cells' share of the grid (chance).

    Args:
      maps: [T, R, C], each summing to 1.
      region: [height, width], above 0 inside; R and C divide its sides.

    Example:
      >>> maps = np.array([[[0.7, 0.1], [0.1, 0.1]]])
      >>> shares, chance = region_shares(maps, np.pad(np.ones((1, 1)), ((0, 3), (0, 3))))
      >>> float(shares[0]), chance
      (0.7, 0.25)
    """
    _, rows, columns = maps.shape
    height, width = region.shape
    touched = region.reshape(rows, height // rows, columns, width // columns).max((1, 3)) > 0
    return (maps * touched).sum((1, 2)), float(touched.mean())


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Scores runs of configs/captions.py on held-out pictures, and draws their attention word by word.

    Raises:
      RunError: a run of another task or model, or none on generated shapes.
    """
    tasks = [_task(run) for run in runs]
    if all(task.pictures != "shapes" for task in tasks):
        raise RunError("captions needs a run on generated shapes, whose places are known: configs/captions.py:shapes.")
    scores: list[dict[str, Any]] = []
    masses: list[dict[str, Any]] = []
    for run, task in zip(runs, tasks, strict=True):
        name = _name(run, task)
        for split in _splits(task):
            told = _tell(run, task, split)
            scores += _score(name, task, split, told)
            if task.pictures == "shapes":
                masses += _place(name, task, run.config["seed"], split, told)
        _draw_maps(study, run, task, name)
    for task in [task for task in tasks if task.pictures == "stamps"][:1]:
        scores += _nearest(task)
    study.add_table(f"Captions of held-out pictures, beam search with {BEAMS} beams", scores)
    study.add_table("Attention on the cells of the grid that a shape touches, while a word is asked for", masses)
    _draw_masses(study, masses)
    study.values.update({"beams": BEAMS, "pictures of a generated split": PICTURES})
    study.claim = (
        "For each word the captioner looks at the part of the picture that the word is about (1502.03044, section "
        "5.4): more attention lies on the named shape than its share of the picture."
    )
    study.outcome = _outcome(scores, masses)


def _task(run: LoadedRun) -> Captions:
    """The run's task, or RunError where it is not what is measured here."""
    if not isinstance(run.task, Captions) or not isinstance(run.module(), Captioner):
        raise RunError(f"captions measures runs of configs/captions.py, {run.folder} is none.")
    return run.task


def _splits(task: Captions) -> tuple[str, ...]:
    return ("validation", "test") if task.pictures == "shapes" else ("test",)


def _name(run: LoadedRun, task: Captions) -> str:
    decoder = "LSTM" if run.config["model"]["decoder"] == "lstm" else "Transformer"
    return f"{decoder}, {task.pictures}"


def _compile(model: Any) -> Callable[[Mapping[str, np.ndarray]], tuple[dict, jax.Array]]:
    """(batch) -> (sums of the loss, maps), compiled once."""
    graph, state = nnx.split(model)

    @jax.jit
    def call(batch):
        module = nnx.merge(graph, state)
        same = {"segment_ids": batch["segment_ids"], "picture": batch["picture"]}
        output = module(batch["inputs"], **same)
        sums = count_batch(output.logits, batch["targets"], batch["loss_weights"])
        return sums, module.alignments(batch["inputs"], **same)

    return call


def _tell(run: LoadedRun, task: Captions, split: str) -> Told:
    seed, model = run.config["seed"], run.module()
    source = task.source(split, seed)
    count = PICTURES if source.endless else len(source)
    call, said, sums, maps = _compile(model), [], [], []
    for first in range(0, count, ROWS):
        # the last batch is filled up, so that one program serves all
        numbers = [min(i, count - 1) for i in range(first, first + ROWS)]
        examples = [source[i] for i in numbers]
        batch = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
        real = min(ROWS, count - first)
        batch["loss_weights"][real:] = 0
        tokens, _ = decode(
            model,
            start=START,
            end=END,
            beams=BEAMS,
            max_steps=task.length,
            length_penalty=0.0,
            picture=batch["picture"],
        )
        said += [task.decode(row) for row in tokens[:real, 0]]
        part, drawn = jax.device_get(call(batch))
        sums.append(part)
        maps.append(drawn[:real])
    wanted = [list(task.reference(split, seed, i)) for i in range(count)]
    loss = sum(float(part["loss"]) for part in sums) / sum(float(part["weight"]) for part in sums)
    return Told(said, wanted, loss, np.concatenate(maps))


def _score(name: str, task: Captions, split: str, told: Told) -> list[dict[str, Any]]:
    """Rows of the table: of a generated split one; of stamps also those whose caption is a training caption, or not."""
    if task.pictures == "shapes":
        kind = "new pictures" if split == "validation" else "pairs of colour and kind never trained on"
        return [_row(name, kind, told.said, told.wanted, told.loss)]
    known = {stamp.words for stamp in stamps.split_stamps(task.folder or stamps.STAMPS_FOLDER)["train"]}
    return [_row(name, "all test stamps", told.said, told.wanted, told.loss), *_by_caption(name, told, known)]


def _by_caption(name: str, told: Told, known: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    rows = []
    for kind, wanted in (("caption is a training caption", True), ("caption is new", False)):
        chosen = [i for i, words in enumerate(told.wanted) if (tuple(words) in known) == wanted]
        if chosen:
            rows.append(_row(name, kind, [told.said[i] for i in chosen], [told.wanted[i] for i in chosen], None))
    return rows


def _row(
    name: str, kind: str, said: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], loss: float | None
) -> dict[str, Any]:
    exact = np.mean([list(a) == list(b) for a, b in zip(said, wanted, strict=True)])
    counts = np.sum([right_words(a, b) for a, b in zip(said, wanted, strict=True)], axis=0)
    bleu = measure_bleu([" ".join(words) for words in said], [" ".join(words) for words in wanted], tokenize="none")
    return {
        "model": name,
        "pictures": kind,
        "count": len(said),
        "loss (nats a word)": "" if loss is None else f"{loss:.4f}",
        "exact captions": f"{exact:.1%}",
        "words right": f"{counts[0] / counts[1]:.1%}",
        "BLEU": "sacrebleu is not installed" if bleu is None else f"{bleu.score:.1f}",
    }


def _nearest(task: Captions) -> list[dict[str, Any]]:
    """What no learning gives: each test stamp is told by the caption of the training stamp with the nearest pixels."""
    folder = task.folder or stamps.STAMPS_FOLDER
    parts = stamps.split_stamps(folder)
    flat = {s: stamps.read_pictures(folder, parts[s], task.size).reshape(len(parts[s]), -1) for s in ("train", "test")}
    trained = flat["train"].astype(np.float32)
    best = [int(np.square(trained - one.astype(np.float32)).sum(1).argmin()) for one in flat["test"]]
    said, wanted = [list(parts["train"][i].words) for i in best], [list(stamp.words) for stamp in parts["test"]]
    told = Told(said, wanted, 0.0, np.zeros(0))
    known = {stamp.words for stamp in parts["train"]}
    name = "caption of the nearest training stamp"
    return [_row(name, "all test stamps", said, wanted, None), *_by_caption(name, told, known)]


def _place(name: str, task: Captions, seed: int, split: str, told: Told) -> list[dict[str, Any]]:
    """Attention on the shape that a word names and on the other one, over scenes of two shapes."""
    kinds: dict[str, list[tuple[float, float, float, float]]] = {"colour": [], "kind": []}
    for number, words in enumerate(told.wanted):
        regions = task.regions(split, seed, number)
        if len(regions) < 2:
            continue
        shares = [region_shares(told.maps[number, : len(words)], region) for region in regions]
        for step, word in enumerate(words):
            if word in shapes.COLOURS or word in shapes.KINDS:
                this = int(step > 2)
                named, other = shares[this], shares[1 - this]
                what = "colour" if word in shapes.COLOURS else "kind"
                kinds[what].append((named[0][step], named[1], other[0][step], other[1]))
    rows = []
    for what, numbers in kinds.items():
        on_named, chance, on_other, other_chance = np.mean(numbers, axis=0)
        rows.append(
            {
                "model": name,
                "pictures": "new" if split == "validation" else "new pairs",
                "word": f"its {what}",
                "on the named shape": float(on_named),
                "its share of the grid": float(chance),
                "on the other shape": float(on_other),
                "share of the other": float(other_chance),
                "words": len(numbers),
            }
        )
    return rows


def _draw_masses(study: Study, masses: Sequence[Mapping[str, Any]]) -> None:
    rows = [row for row in masses if row["pictures"] == "new"]
    figure, axes = new_figure(width=7.0, height=3.4)
    axis = axes[0, 0]
    places, thick = np.arange(len(rows)), 0.36
    for offset, colour, which, chance, label in (
        (-thick / 2, COLOURS[0], "on the named shape", "its share of the grid", "on the shape that the word is about"),
        (thick / 2, COLOURS[4], "on the other shape", "share of the other", "on the other shape"),
    ):
        axis.bar(places + offset, [row[which] for row in rows], thick, color=colour, label=label)
        for place, row in zip(places, rows, strict=True):
            ends = place + offset - thick / 2, place + offset + thick / 2
            axis.plot(ends, [row[chance]] * 2, color="black", linewidth=1.8, linestyle=":")
    axis.plot([], [], color="black", linewidth=1.8, linestyle=":", label="its share of the picture's cells (chance)")
    axis.set_xticks(places, [f"{row['model'].split(',')[0]}:\n{row['word']}" for row in rows])
    axis.set_ylabel("attention (share of 1)")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")
    study.save_figure(
        figure,
        "masses",
        "Attention on the cells that each of two shapes touches while a word for one of them is asked for, mean over "
        "generated pictures that were not trained on. Claim: it lies on the shape that the word is about, above the "
        "dotted share that even attention would give.",
    )


def _draw_maps(study: Study, run: LoadedRun, task: Captions, name: str, rows: int = 4) -> None:
    """Held-out pictures, and each again for every word of the caption that the model itself says."""
    seed, splits = run.config["seed"], _splits(task)
    model: Any = run.module()
    chosen = [(split, i) for split in splits for i in _choose(task, split, seed, rows // len(splits))]
    picture = np.stack([task.source(split, seed)[i]["picture"] for split, i in chosen])
    tokens, _ = decode(
        model, start=START, end=END, beams=BEAMS, max_steps=task.length, length_penalty=0.0, picture=picture
    )
    said = [task.decode(row) for row in tokens[:, 0]]
    inputs = np.concatenate([np.full((len(said), 1), START, np.int32), tokens[:, 0, :-1]], axis=1)
    maps = np.asarray(model.alignments(jnp.asarray(inputs), picture=jnp.asarray(picture)))
    columns = 1 + max(len(words) for words in said)
    figure, axes = new_figure(len(said), columns, width=max(4.0, 1.0 * columns), height=1.22 * len(said))
    for row, words in enumerate(said):
        split, number = chosen[row]
        verdict = "right" if tuple(words) == task.reference(split, seed, number) else "wrong"
        for axis in axes[row]:
            axis.axis("off")
        axes[row, 0].imshow(picture[row], interpolation="nearest")
        pair = "new pair: " if task.pictures == "shapes" and split == "test" else ""
        axes[row, 0].set_title(pair + verdict, fontsize=7.5, style="italic")
        for step, word in enumerate(words):
            axes[row, step + 1].imshow(_light(picture[row], maps[row, step]), interpolation="nearest")
            axes[row, step + 1].set_title(word, fontsize=9)
    if task.pictures == "stamps":
        # the stamps are under the GPL: drawn beside the run, never among the results that are committed
        path = os.path.join(run.folder, "captions-maps.png")
        figure.savefig(path, dpi=100)
        say(f"attention over stamps: {path}")
        return
    study.save_figure(
        figure,
        f"maps-{name.split(',')[0].lower()}",
        f"{name}: held-out pictures, and for each word of the caption that beam search says the picture lit where the "
        "attention lies (dark blue: nowhere). Claim: the light falls on what the word names.",
    )


def _choose(task: Captions, split: str, seed: int, count: int) -> list[int]:
    """Pictures that show most: of shapes those with two, of stamps those whose words the model could know."""
    known, chosen = set(task.words), []
    for number in range(40 if task.pictures == "shapes" else len(task.source(split, seed))):
        words = task.reference(split, seed, number)
        if len(words) >= (7 if task.pictures == "shapes" else 3) and known >= set(words):
            chosen.append(number)
    return chosen[:: max(1, len(chosen) // count)][:count]


def _light(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture where attention is greatest, dark blue where it is none (black shapes must be seen in both)."""
    cell = picture.shape[0] // weights.shape[0], picture.shape[1] // weights.shape[1]
    light = np.kron(weights / weights.max(), np.ones(cell))[:, :, None]
    return picture * light + np.array([0.1, 0.15, 0.4]) * (1 - light)


def _outcome(scores: Sequence[Mapping[str, Any]], masses: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        f"{row['model']}, {row['pictures']}: {row['exact captions']} exact, {row['words right']} of words right"
        for row in scores
        if row["pictures"] in ("new pictures", "pairs of colour and kind never trained on", "all test stamps")
    ]
    for row in masses:
        if row["pictures"] == "new":
            parts.append(
                f"{row['model'].split(',')[0]} saying {row['word'].replace('its', 'a')}: "
                f"{row['on the named shape']:.2f} of the attention on the named shape (share "
                f"{row['its share of the grid']:.2f}), {row['on the other shape']:.2f} on the other "
                f"(share {row['share of the other']:.2f})"
            )
    return "; ".join(parts) + "."
