"""Captions of pictures: generated shapes, or Tux Paint's stamps where they are installed."""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice
from memformer.data import shapes, stamps
from memformer.data.source import (
    SPLITS,
    Example,
    Extra,
    FiniteSource,
    RandomAccessSource,
    SyntheticSource,
    make_example,
)
from memformer.tasks.task import Task

__all__ = ["Captions"]

# Special ids, before those of words: padding, the first input, the last target, words outside the vocabulary.
PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")

# Minimum number of training captions that contain a word of the vocabulary.
LEAST_COUNT = 2

# Training stamps are shifted by up to this fraction of the side.
SHIFT = 1 / 8

PICTURES = ("shapes", "stamps")


@dataclasses.dataclass(frozen=True)
class Captions(Task):
    """Describe a picture, word by word.

    Inputs are the start token and the words of the caption, targets are the words and the end token; `picture` is an
    extra. A caption of more than `length` - 1 words is truncated, and has no end token.

    With `pictures` = "shapes", pictures of one or two coloured shapes are generated (`memformer.data.draw_scene`). Six
    of the thirty pairs of colour and kind are in no training or validation picture; every test picture has one of them.

    With `pictures` = "stamps", pictures are the 785 captioned stamps of the package tuxpaint-stamps-default, split by
    picture (`memformer.data.split_stamps`, which also states its limits). Training pictures are drawn at
    random, shifted by up to an eighth of the side, and mirrored where their options allow it; validation and test have
    each picture once. Words of fewer than two training captions are "<unknown>", which is an input but is not scored,
    so that no model is rewarded for predicting it.

    Attributes:
      length: time steps of an example.
      pictures: "shapes" or "stamps".
      size: side of the square pictures in pixels.
      folder: folder of the stamps; "" is that of the package. Must be "" for shapes.

    Raises:
      ValueError: an option out of range; stamps that are not installed (the message names the package, and the
        alternative without it).

    Example:
      >>> task = Captions()
      >>> one = task.source("train", 0)[4]
      >>> one["picture"].shape, " ".join(task.decode(one["targets"]))
      ((32, 32, 3), 'a yellow circle right of a purple square')
    """

    name = "captions"
    scores = ("accuracy", "sequence_accuracy")

    length: int = 12
    pictures: str = "shapes"
    size: int = 32
    folder: str = ""

    def __post_init__(self):
        check_choice("pictures", self.pictures, PICTURES)
        # A caption of shapes always fits, with its end token.
        check_at_least("length", self.length, shapes.LONGEST + 1 if self.pictures == "shapes" else 2)
        check_at_least("size", self.size, 16)
        check(isinstance(self.folder, str), "folder", "a string", self.folder)
        unused = not self.folder or self.pictures != "shapes"
        check(unused, "folder", "'' for pictures='shapes', which has no files", self.folder)

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the word of each id, special ids first."""
        return SPECIAL + (shapes.WORDS if self.pictures == "shapes" else _stamp_words(self._root()))

    @property
    def vocab_size(self) -> int:
        """Words and special ids."""
        return len(self.words)

    @property
    def num_classes(self) -> int:
        """Targets have the same ids as inputs."""
        return self.vocab_size

    @property
    def extras(self) -> Mapping[str, Extra]:
        """The picture, float32 [size, size, 3] in [0, 1]: rows, columns, red-green-blue."""
        return {"picture": Extra((self.size, self.size, 3), "float32")}

    @property
    def chance(self) -> None:
        """None: no constant answer is a baseline for captions."""
        return None

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of words; words outside the vocabulary are `UNKNOWN`."""
        ids = _number(self.words)
        return [ids.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Words up to the end token or the first padding."""
        known, words = self.words, []
        for number in map(int, ids):
            if number in (PADDING, END):
                break
            words.append(known[number])
        return words

    def reference(self, split: str, seed: int, index: int) -> tuple[str, ...]:
        """The full caption of an example, with the words outside the vocabulary and the truncated ones.

        Raises:
          ValueError: training stamps, which are drawn at random.
        """
        if self.pictures == "shapes":
            source = self.source(split, seed)
            return tuple(self.decode(source[index]["targets"]))
        if split == "train":
            raise ValueError("split must be 'validation' or 'test' for stamps, got 'train'")
        return stamps.split_stamps(self._root())[split][index].words

    def regions(self, split: str, seed: int, index: int) -> np.ndarray:
        """Coverage of each pixel by the shapes of an example, [shapes, size, size], in the order of the caption.

        Raises:
          ValueError: stamps, which have no annotated regions.
        """
        if self.pictures != "shapes":
            raise ValueError("pictures must be 'shapes' for regions: stamps have no annotated regions")

        def cover(rng: np.random.Generator, _: int) -> Example:
            figures = shapes.draw_scene(rng, held_out=split == "test")[1]
            return {"regions": np.stack([shapes.figure_coverage(figure, self.size) for figure in figures])}

        return SyntheticSource(cover, split, seed)[index]["regions"]

    def source(self, split: str, seed: int) -> RandomAccessSource:
        """Pictures of one split; the seed has no effect on held-out stamps."""
        check_choice("split", split, SPLITS)
        if self.pictures == "shapes":

            def draw(rng: np.random.Generator, _: int) -> Example:
                relation, figures = shapes.draw_scene(rng, held_out=split == "test")
                picture = shapes.paint_scene(rng, figures, self.size)
                return self._example(shapes.describe_scene(relation, figures), picture)

            return SyntheticSource(draw, split, seed)
        chosen = stamps.split_stamps(self._root())[split]
        pictures = stamps.read_pictures(self._root(), chosen, self.size)
        if split == "train" and chosen:

            def vary(rng: np.random.Generator, _: int) -> Example:
                number = rng.integers(len(chosen))
                return self._example(chosen[number].words, _vary(rng, pictures[number], chosen[number].mirrors))

            return SyntheticSource(vary, split, seed)
        return FiniteSource(lambda i: self._example(chosen[i].words, _scale(pictures[i])), len(chosen))

    def _example(self, words: Sequence[str], picture: np.ndarray) -> Example:
        ids = self.encode(words)
        used = min(len(ids) + 1, self.length)
        inputs, targets = np.zeros((2, self.length), np.int32)
        inputs[:used] = [START, *ids][:used]
        targets[:used] = [*ids, END][:used]
        weights = ((np.arange(self.length) < used) & (targets != UNKNOWN)).astype(np.float32)
        return {**make_example(inputs, targets, weights, used), "picture": picture}

    def _root(self) -> str:
        return os.path.expanduser(self.folder) or stamps.STAMPS_FOLDER


@functools.cache
def _stamp_words(folder: str) -> tuple[str, ...]:
    """Words of at least `LEAST_COUNT` training captions, sorted."""
    captions = [stamp.words for stamp in stamps.split_stamps(folder)["train"]]
    counts = collections.Counter(word for words in captions for word in set(words))
    return tuple(sorted(word for word, count in counts.items() if count >= LEAST_COUNT))


@functools.lru_cache(maxsize=4)
def _number(words: tuple[str, ...]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _scale(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / np.float32(255)


def _vary(rng: np.random.Generator, picture: np.ndarray, mirrors: bool) -> np.ndarray:
    """Shifts a picture on its white background, and mirrors half of those that allow it."""
    size = len(picture)
    reach = round(SHIFT * size)
    down, right = rng.integers(2 * reach + 1, size=2)
    if mirrors and rng.random() < 0.5:
        picture = picture[:, ::-1]
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), constant_values=255)
    return _scale(padded[down : down + size, right : right + size])
