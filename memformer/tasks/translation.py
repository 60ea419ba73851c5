"""Translation of verses from English to Spanish, with one byte-pair vocabulary for both languages."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice
from memformer.data.bpe import BYTES, BytePairs, train_bpe
from memformer.data.source import SPLITS, Example, Extra, FiniteSource, make_example
from memformer.data.verses import VERSES_PACKAGES, Verse, find_verses, split_verses
from memformer.tasks.task import Task

__all__ = ["Translation", "VersePair"]

# Special ids, before those of byte pairs: padding, the first input, the last token of source and target.
PADDING, START, END = range(3)
SPECIAL = 3

CORPORA = ("auto", "installed", "slice")


class VersePair(NamedTuple):
    """A verse and its ids in both languages, without start and end tokens."""

    verse: Verse
    source: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def length(self) -> int:
        """Time steps of the pair: the longer of both, and an end token."""
        return max(len(self.source), len(self.target)) + 1


@dataclasses.dataclass(frozen=True)
class Translation(Task):
    """Translate an English verse into Spanish.

    Inputs are the start token and the Spanish ids, targets are the Spanish ids and the end token. The extras are
    `source`, the English ids and the end token, and `source_segment_ids`, 1 on these and 0 on padding. Verses longer
    than `length` - 1 ids in either language are left out.

    The corpus is "installed", the 31,084 verses of the packages sword-text-kjv and sword-text-sparv; "slice", the 514
    verses of Genesis 1 to 20 that this package contains; or "auto", the installed verses where they exist and else the
    slice, with a warning in the log. Both are in the public domain. The vocabulary is learned from all training verses,
    and no English verse is in two splits (`memformer.data.split_verses`).

    Attributes:
      length: time steps of source and target, the end token included.
      vocab_size: number of ids of both languages, the three special ids included; a small corpus leaves the last ids
        unused.
      corpus: "auto", "installed" or "slice".
      folder: folder of the SWORD modules; "" searches the usual folders.

    Raises:
      ValueError: an option out of range; verses that are not installed (the message names the packages).

    Example:
      >>> task = Translation(corpus="slice", vocab_size=500)
      >>> one = task.source("train", 0)[0]
      >>> task.decode(one["source"])
      'In the beginning God created the heaven and the earth.'
      >>> task.decode(one["targets"])
      'EN el principio crió Dios los cielos y la tierra.'
    """

    name = "translation"
    scores = ("perplexity", "accuracy")

    length: int = 40
    vocab_size: int = 4000
    corpus: str = "auto"
    folder: str = ""

    def __post_init__(self):
        check_at_least("length", self.length, 2)
        check_at_least("vocab_size", self.vocab_size, SPECIAL + BYTES)
        check_choice("corpus", self.corpus, CORPORA)
        check(isinstance(self.folder, str), "folder", "a string", self.folder)
        unused = not self.folder or self.corpus != "slice"
        check(unused, "folder", "'' for corpus='slice', which has no files", self.folder)

    @property
    def resolved(self) -> Mapping[str, str]:
        """The corpus that "auto" selects here; the vocabulary depends on it."""
        return {"corpus": "installed" if self._root() else "slice"}

    @property
    def num_classes(self) -> int:
        """Targets have the same ids as inputs."""
        return self.vocab_size

    @property
    def extras(self) -> Mapping[str, Extra]:
        """The English ids, and their segment ids."""
        return {
            "source": Extra((self.length,), "int32", self.vocab_size),
            "source_segment_ids": Extra((self.length,), "int32", 2),
        }

    @property
    def chance(self) -> None:
        """None: no constant answer is a baseline for translation."""
        return None

    @property
    def byte_pairs(self) -> BytePairs:
        """The encoding of both languages, learned from the training verses."""
        return _learn(self._root(), self.vocab_size - SPECIAL)

    @property
    def origin(self) -> str:
        """Description of the corpus for people."""
        root = self._root()
        count = sum(len(split_verses(root, split)) for split in SPLITS)
        corpus = " and ".join(VERSES_PACKAGES) if root else "Genesis 1 to 20, included in the package"
        return f"{count:,} verses of {corpus}"

    def encode(self, text: str) -> list[int]:
        """Ids of a text in either language, without start and end tokens."""
        return [SPECIAL + i for i in self.byte_pairs.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids before the end token or the first padding; unused ids are skipped."""
        pairs, kept = self.byte_pairs, []
        for number in map(int, ids):
            if number in (PADDING, END):
                break
            if SPECIAL <= number < SPECIAL + pairs.size:
                kept.append(number - SPECIAL)
        return pairs.decode(kept)

    def pairs(self, split: str) -> tuple[VersePair, ...]:
        """The verses of a split that fit into `length`, in the order of `source`."""
        check_choice("split", split, SPLITS)
        every = _encode_split(self._root(), self.vocab_size - SPECIAL, split)
        return tuple(pair for pair in every if pair.length <= self.length)

    def source(self, split: str, seed: int) -> FiniteSource:
        """The verses of a split; the seed has no effect."""
        pairs = self.pairs(split)
        return FiniteSource(lambda i: self._example(pairs[i]), len(pairs))

    def _example(self, pair: VersePair) -> Example:
        _, source, target = pair
        used = len(target) + 1
        rest = self.length - used
        weights = np.pad(np.ones(used, np.float32), (0, rest))
        inputs = np.pad(np.array([START, *target], np.int32), (0, rest))
        targets = np.pad(np.array([*target, END], np.int32), (0, rest))
        read = np.pad(np.array([*source, END], np.int32), (0, self.length - len(source) - 1))
        return {
            **make_example(inputs, targets, weights, used),
            "source": read,
            "source_segment_ids": (np.arange(self.length) <= len(source)).astype(np.int32),
        }

    def _root(self) -> str:
        """Folder of the modules; "" for the slice."""
        root = "" if self.corpus == "slice" else find_verses(os.path.expanduser(self.folder)) or ""
        if not root and (self.corpus == "installed" or self.folder):
            raise ValueError(
                f"task.folder {self.folder!r} has no verses: install them (apt-get install "
                f"{' '.join(VERSES_PACKAGES)}) or set task.folder to the folder of the SWORD modules; "
                "task.corpus='slice' needs neither"
            )
        if not root and self.corpus == "auto":
            _warn()
        return root


@functools.cache
def _warn() -> None:
    # Once per process.
    logging.getLogger(__name__).warning(
        "task translation: %s are not installed (apt-get install %s); using 514 verses of Genesis instead",
        " and ".join(VERSES_PACKAGES),
        " ".join(VERSES_PACKAGES),
    )


@functools.lru_cache(maxsize=4)
def _learn(root: str, size: int) -> BytePairs:
    return train_bpe((text for verse in split_verses(root, "train") for text in verse), size)


# About 30,000 verses of 70 ids take 50 MB as tuples.
@functools.lru_cache(maxsize=6)
def _encode_split(root: str, size: int, split: str) -> tuple[VersePair, ...]:
    encoding = _learn(root, size)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(SPECIAL + i for i in encoding.encode(text))

    return tuple(VersePair(verse, *map(encode, verse)) for verse in split_verses(root, split))
