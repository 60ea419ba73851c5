"""Captions of held-out pictures by beam search, and the attention on the picture at each word."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.data import shapes, stamps
from memformer.lab.bleu import measure_bleu
from memformer.lab.plots import Bars, new_figure
from memformer.lab.runs import measure_seeds
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.models.beam import decode
from memformer.models.captioner import Captioner
from memformer.tasks import Captions
from memformer.tasks.captions import END, START
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.losses import count_batch

__all__ = ["CAPTIONS", "Captioned", "correct_words", "region_shares"]

BEAMS = 4
# Pictures of an endless split, and rows per batch.
PICTURES, ROWS = 512, 64


class Captioned(NamedTuple):
    """A model's captions of a split's pictures.

    Attributes:
      captions: words of the best caption of beam search, for each picture.
      references: words of the true caption.
      loss: of the true captions' scored words, in nats per word.
      maps: [N, T, R, C], the attention at each word of the true caption.
    """

    captions: list[list[str]]
    references: list[list[str]]
    loss: float
    maps: np.ndarray


def correct_words(words: Sequence[str], reference: Sequence[str]) -> tuple[int, int]:
    """(words at the place where the reference has them, words of the longer of the two).

    Example:
      >>> correct_words(["a", "red", "ring"], ["a", "blue", "ring", "above", "it"])
      (2, 5)
    """
    return sum(a == b for a, b in zip(words, reference, strict=False)), max(len(words), len(reference))


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


@measure_seeds
def _measure(runs: Runs, settings: Settings) -> Result:
    """Scores runs of configs/captions.py on held-out pictures, and their attention at each word."""
    tasks = [_task(run) for run in runs.values()]
    if all(task.pictures != "shapes" for task in tasks):
        raise RunError("captions needs a run on generated shapes, whose places are known: configs/captions.py:shapes.")
    scores: list[Row] = []
    masses: list[Row] = []
    for run, task in zip(runs.values(), tasks, strict=True):
        name = _name(run, task)
        for split in _splits(task):
            one = _caption(run, task, split)
            scores += _score(name, task, split, one)
            if task.pictures == "shapes":
                masses += _place(name, task, run.config["seed"], split, one)
    for task in [task for task in tasks if task.pictures == "stamps"][:1]:
        scores += _nearest(task)
    return Result(
        [
            Table(f"Captions of held-out pictures, beam search with {BEAMS} beams", scores),
            Table("Attention on the cells of the grid that a shape touches, at the words for it", masses),
        ],
        {
            f"{place}, times its share": {
                f"{row['model']}, {row['pictures']}, {row['word']}": row[f"on the {place} shape"] / row[share]
                for row in masses
            }
            for place, share in (("named", "its share of the grid"), ("other", "share of the other"))
        },
    )


def _task(run: LoadedRun) -> Captions:
    """The run's task; RunError for a run of another task."""
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


def _caption(run: LoadedRun, task: Captions, split: str) -> Captioned:
    seed, model = run.config["seed"], run.module()
    source = task.source(split, seed)
    count = PICTURES if source.endless else len(source)
    call, captions, sums, maps = _compile(model), [], [], []
    for first in range(0, count, ROWS):
        # the last batch is padded, so that one program serves all
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
        captions += [task.decode(row) for row in tokens[:real, 0]]
        part, drawn = jax.device_get(call(batch))
        sums.append(part)
        maps.append(drawn[:real])
    references = [list(task.reference(split, seed, i)) for i in range(count)]
    loss = sum(float(part["loss"]) for part in sums) / sum(float(part["weight"]) for part in sums)
    return Captioned(captions, references, loss, np.concatenate(maps))


def _score(name: str, task: Captions, split: str, one: Captioned) -> list[Row]:
    """Rows of the table: one of a generated split; of stamps also by whether training has the caption."""
    if task.pictures == "shapes":
        kind = "new pictures" if split == "validation" else "pairs of colour and kind never trained on"
        return [_row(name, kind, one.captions, one.references, one.loss)]
    known = {stamp.words for stamp in stamps.split_stamps(task.folder or stamps.STAMPS_FOLDER)["train"]}
    return [_row(name, "all test stamps", one.captions, one.references, one.loss), *_by_caption(name, one, known)]


def _by_caption(name: str, one: Captioned, known: set[tuple[str, ...]]) -> list[Row]:
    rows = []
    for kind, trained in (("caption is a training caption", True), ("caption is new", False)):
        chosen = [i for i, words in enumerate(one.references) if (tuple(words) in known) == trained]
        if chosen:
            captions, references = ([words[i] for i in chosen] for words in (one.captions, one.references))
            rows.append(_row(name, kind, captions, references, None))
    return rows


def _row(
    name: str, kind: str, captions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], loss: float | None
) -> Row:
    exact = np.mean([list(a) == list(b) for a, b in zip(captions, references, strict=True)])
    counts = np.sum([correct_words(a, b) for a, b in zip(captions, references, strict=True)], axis=0)
    bleu = measure_bleu(*([" ".join(words) for words in one] for one in (captions, references)), tokenize="none")
    return {
        "model": name,
        "pictures": kind,
        "count": len(captions),
        "loss (nats per word)": "" if loss is None else f"{loss:.4f}",
        "exact captions": f"{exact:.1%}",
        "correct words": f"{counts[0] / counts[1]:.1%}",
        "BLEU": "sacrebleu is not installed" if bleu is None else f"{bleu.score:.1f}",
    }


def _nearest(task: Captions) -> list[Row]:
    """A baseline without learning: the caption of the training stamp with the nearest pixels."""
    folder = task.folder or stamps.STAMPS_FOLDER
    parts = stamps.split_stamps(folder)
    flat = {s: stamps.read_pictures(folder, parts[s], task.size).reshape(len(parts[s]), -1) for s in ("train", "test")}
    trained = flat["train"].astype(np.float32)
    best = [int(np.square(trained - one.astype(np.float32)).sum(1).argmin()) for one in flat["test"]]
    captions, references = [list(parts["train"][i].words) for i in best], [list(one.words) for one in parts["test"]]
    one = Captioned(captions, references, 0.0, np.zeros(0))
    known = {stamp.words for stamp in parts["train"]}
    name = "caption of the nearest training stamp"
    return [_row(name, "all test stamps", captions, references, None), *_by_caption(name, one, known)]


def _place(name: str, task: Captions, seed: int, split: str, one: Captioned) -> list[Row]:
    """Attention on the shape that a word names and on the other one, over scenes of two shapes."""
    kinds: dict[str, list[tuple[float, float, float, float]]] = {"colour": [], "kind": []}
    for number, words in enumerate(one.references):
        regions = task.regions(split, seed, number)
        if len(regions) < 2:
            continue
        shares = [region_shares(one.maps[number, : len(words)], region) for region in regions]
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


def _judge(result: Result) -> Verdict:
    """Needed, as stated before the runs: in every seed, at every word, more than the share and less than it."""
    named, other = (
        [ratio for seeds in result.values[f"{place}, times its share"].values() for ratio in seeds]
        for place in ("named", "other")
    )
    return Verdict(
        grade(min(named) > 1 > max(other)),
        f"The named shape gets {min(named):.1f} to {max(named):.1f} times its share of the attention, the "
        f"other one {min(other):.1f} to {max(other):.1f} times (needed in every seed: above 1 and below 1).",
    )


def _examples(runs: Runs) -> Mapping[str, Any]:
    return {
        f"maps-{_name(run, _task(run)).replace(', ', '-').lower()}": _draw_maps(run, _task(run))
        for run in runs.values()
        if run.config["seed"] == 0
    }


def _draw_maps(run: LoadedRun, task: Captions, rows: int = 4) -> Any:
    """Held-out pictures, and each again for every word of the model's own caption, lit where the attention lies."""
    seed, splits = run.config["seed"], _splits(task)
    model: Any = run.module()
    chosen = [(split, i) for split in splits for i in _choose(task, split, seed, rows // len(splits))]
    picture = np.stack([task.source(split, seed)[i]["picture"] for split, i in chosen])
    tokens, _ = decode(
        model, start=START, end=END, beams=BEAMS, max_steps=task.length, length_penalty=0.0, picture=picture
    )
    captions = [task.decode(row) for row in tokens[:, 0]]
    inputs = np.concatenate([np.full((len(captions), 1), START, np.int32), tokens[:, 0, :-1]], axis=1)
    maps = np.asarray(model.alignments(jnp.asarray(inputs), picture=jnp.asarray(picture)))
    columns = 1 + max(len(words) for words in captions)
    figure, axes = new_figure(len(captions), columns, width=max(4.0, 1.0 * columns), height=1.22 * len(captions))
    for row, words in enumerate(captions):
        split, number = chosen[row]
        verdict = "correct" if tuple(words) == task.reference(split, seed, number) else "wrong"
        for axis in axes[row]:
            axis.axis("off")
        axes[row, 0].imshow(picture[row], interpolation="nearest")
        pair = "new pair: " if task.pictures == "shapes" and split == "test" else ""
        axes[row, 0].set_title(pair + verdict, fontsize=7.5, style="italic")
        for step, word in enumerate(words):
            axes[row, step + 1].imshow(_light(picture[row], maps[row, step]), interpolation="nearest")
            axes[row, step + 1].set_title(word, fontsize=9)
    return figure


def _choose(task: Captions, split: str, seed: int, count: int) -> list[int]:
    """Of shapes the pictures with two, of stamps those whose words the model could know."""
    known, chosen = set(task.words), []
    for number in range(40 if task.pictures == "shapes" else len(task.source(split, seed))):
        words = task.reference(split, seed, number)
        if len(words) >= (7 if task.pictures == "shapes" else 3) and known >= set(words):
            chosen.append(number)
    return chosen[:: max(1, len(chosen) // count)][:count]


def _light(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture, dark blue where the attention is zero (a colour that no shape has)."""
    cell = picture.shape[0] // weights.shape[0], picture.shape[1] // weights.shape[1]
    light = np.kron(weights / weights.max(), np.ones(cell))[:, :, None]
    return picture * light + np.array([0.1, 0.15, 0.4]) * (1 - light)


CAPTIONS = Study(
    name="captions",
    title="Captions: attention on the named shape",
    claim="For each word the captioner attends to the part of the picture that the word is about: more attention lies "
    "on the named shape than its share of the picture.",
    source="arXiv 1502.03044, section 5.4",
    measure=_measure,
    judge=_judge,
    draw=Bars(
        index=("model", "word"),
        columns=("on the named shape", "on the other shape", "its share of the grid"),
        label="attention (share of 1)",
        table=1,
        keep=lambda row: row["pictures"] == "new",
    ),
    caption="Attention on the grid cells of two shapes at the words for one of them, mean over generated pictures that "
    "were not trained on (mean of three seeds, least to greatest). The LSTM names the colour first, and what it "
    "sees then stays in its state: in two of three seeds 88 and 96% of its attention at the word for the kind lie on "
    "neither shape, and 99% of the captions are exact.",
    reads="configs/captions.py",
    examples=_examples,
)
