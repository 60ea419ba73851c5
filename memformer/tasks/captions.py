"""Captions of pictures: real ones (Tux Paint's stamps, where they are installed) or generated ones (placed shapes)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memformer.data import stamps
from memformer.data.source import (
    SPLITS,
    Example,
    Extra,
    RandomAccessSource,
    SyntheticSource,
    Task,
    check_at_least,
    check_choice,
    example,
)
from memformer.tasks import shapes

__all__ = ["END", "START", "UNKNOWN", "Captions"]

# Ids before those of words: padding, the first input, the last target, and any word that is not in the vocabulary.
PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")

# Captions of training pictures that must have a word, for the word to have an id of its own.
LEAST_COUNT = 2

# Stamps move by up to this part of the side in training.
SHIFT = 1 / 8

PICTURES = ("shapes", "stamps")


@dataclasses.dataclass(frozen=True)
class Captions(Task):
    """Say what a picture shows, word by word.

    Inputs are the start token and the caption's words, targets the words and the end token; `picture` is an extra
    of each example. A caption of more than `length` - 1 words is cut, and has no end token then.

    `pictures` = "shapes": one coloured shape or two, generated (`memformer.tasks.shapes`), endless. Six of the thirty
    pairs of colour and kind are in no training or validation picture; every test picture has at least one of them.

    `pictures` = "stamps": the 785 captioned stamps of the package tuxpaint-stamps-default, split by picture
    (`memformer.data.stamps.split_stamps` says what that does and does not keep apart). Training pictures are drawn
    at random, endlessly, moved by up to an eighth of the side, and mirrored where their options allow it; validation
    and test are each picture once. Words of one training caption only, and words that none has, are "<unknown>": read,
    but not scored, so that no model is praised for saying it.

    Attributes:
      length: time steps of an example.
      pictures: "shapes" or "stamps".
      size: side of the square pictures in pixels.
      folder: where the stamps lie; "" is where the package puts them. Shapes have none.

    Raises:
      ValueError: a setting out of range, named; stamps that are not installed (naming the package to install, and
        what runs without it).

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
        # With the end token, a sentence of shapes always fits.
        check_at_least("length", self.length, shapes.LONGEST + 1 if self.pictures == "shapes" else 2)
        check_at_least("size", self.size, 16)
        if not isinstance(self.folder, str):
            raise ValueError(f"folder must be a text, got {self.folder!r}")
        if self.folder and self.pictures == "shapes":
            raise ValueError(f"folder must be '' where pictures is 'shapes', which has no files, got {self.folder!r}")

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the word of each id, the special ones first."""
        return SPECIAL + (shapes.WORDS if self.pictures == "shapes" else _stamp_words(self._root()))

    @property
    def vocab_size(self) -> int:
        """Words and the four special ids."""
        return len(self.words)

    @property
    def num_classes(self) -> int:
        """Targets have the ids of inputs."""
        return self.vocab_size

    @property
    def extras(self) -> Mapping[str, Extra]:
        """The picture, float32 [size, size, 3] in [0, 1]: rows, columns, red-green-blue."""
        return {"picture": Extra((self.size, self.size, 3), "float32")}

    @property
    def chance(self) -> None:
        """None: a blind caption is not one constant answer."""
        return None

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of words; those that the vocabulary lacks are `UNKNOWN`."""
        ids = _number(self.words)
        return [ids.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Words up to the end token or the first padding."""
        known, said = self.words, []
        for number in map(int, ids):
            if number in (PADDING, END):
                break
            said.append(known[number])
        return said

    def reference(self, split: str, seed: int, index: int) -> tuple[str, ...]:
        """The caption of an example in full: words that have no id of their own, and those that were cut.

        Raises:
          ValueError: training stamps, which are drawn at random, have no number.
        """
        if self.pictures == "shapes":
            source = self.source(split, seed)
            return tuple(self.decode(source[index]["targets"]))
        if split == "train":
            raise ValueError("split must be 'validation' or 'test' for stamps, got 'train'")
        return stamps.split_stamps(self._root())[split][index].words

    def regions(self, split: str, seed: int, index: int) -> np.ndarray:
        """Where the shapes of an example lie: coverage of each pixel, [shapes, size, size], in the order of naming.

        Raises:
          ValueError: stamps, of which nobody knows.
        """
        if self.pictures != "shapes":
            raise ValueError("pictures must be 'shapes' for regions: where the things of a stamp lie is not known")

        def cover(rng: np.random.Generator, _: int) -> Example:
            figures = shapes.draw(rng, held_out=split == "test")[1]
            return {"regions": np.stack([shapes.cover(figure, self.size) for figure in figures])}

        return SyntheticSource(cover, split, seed)[index]["regions"]

    def source(self, split: str, seed: int) -> RandomAccessSource:
        """Pictures of one split; the seed plays no part where stamps are held out."""
        check_choice("split", split, SPLITS)
        if self.pictures == "shapes":

            def draw(rng: np.random.Generator, _: int) -> Example:
                relation, figures = shapes.draw(rng, held_out=split == "test")
                return self._example(shapes.caption(relation, figures), shapes.paint(rng, figures, self.size))

            return SyntheticSource(draw, split, seed)
        chosen = stamps.split_stamps(self._root())[split]
        pictures = stamps.read_pictures(self._root(), chosen, self.size)
        if split == "train" and chosen:

            def vary(rng: np.random.Generator, _: int) -> Example:
                number = rng.integers(len(chosen))
                return self._example(chosen[number].words, _vary(rng, pictures[number], chosen[number].mirrors))

            return SyntheticSource(vary, split, seed)
        return _Each(lambda i: self._example(chosen[i].words, _scale(pictures[i])), len(chosen))

    def _example(self, words: Sequence[str], picture: np.ndarray) -> Example:
        ids = self.encode(words)
        used = min(len(ids) + 1, self.length)
        inputs, targets = np.zeros((2, self.length), np.int32)
        inputs[:used] = [START, *ids][:used]
        targets[:used] = [*ids, END][:used]
        weights = ((np.arange(self.length) < used) & (targets != UNKNOWN)).astype(np.float32)
        return {**example(inputs, targets, weights, used), "picture": picture}

    def _root(self) -> str:
        return self.folder or stamps.FOLDER


class _Each:
    """Held-out pictures, each once."""

    endless = False

    def __init__(self, make: Callable[[int], Example], length: int):
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(f"picture number must be in [0, {self._length}), got {index}")
        return self._make(index)


@functools.cache
def _stamp_words(folder: str) -> tuple[str, ...]:
    """Words that at least `LEAST_COUNT` training captions have, in the order of the alphabet."""
    captions = [stamp.words for stamp in stamps.split_stamps(folder)["train"]]
    counts = collections.Counter(word for words in captions for word in set(words))
    return tuple(sorted(word for word, count in counts.items() if count >= LEAST_COUNT))


@functools.lru_cache(maxsize=4)
def _number(words: tuple[str, ...]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _scale(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / np.float32(255)


def _vary(rng: np.random.Generator, picture: np.ndarray, mirrors: bool) -> np.ndarray:
    """Moves a picture over its white ground, and mirrors half of those that may be."""
    size = len(picture)
    reach = round(SHIFT * size)
    down, right = rng.integers(2 * reach + 1, size=2)
    if mirrors and rng.random() < 0.5:
        picture = picture[:, ::-1]
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), constant_values=255)
    return _scale(padded[down : down + size, right : right + size])
