"""Translation of verses from English to Spanish, in byte pairs that both languages share."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from memformer.data.bpe import BYTES, BytePairs, train_bpe
from memformer.data.source import SPLITS, Example, Extra, Task, check_at_least, check_choice, example
from memformer.data.verses import PACKAGES, Verse, find_modules, read_modules, read_slice

__all__ = ["END", "PADDING", "START", "Pair", "Translation"]

# Ids before those of byte pairs: padding, the first input, the last token of source and target.
PADDING, START, END = range(3)
SPECIAL = 3

# Of a hundred English verses, by hash: test below the first number, validation below the second.
TEST_SHARE, VALIDATION_SHARE = 6, 12

CORPORA = ("auto", "installed", "slice")


class Pair(NamedTuple):
    """A verse and its ids, without start and end tokens."""

    verse: Verse
    source: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def length(self) -> int:
        """Time steps it takes: the longer of both, and an end token."""
        return max(len(self.source), len(self.target)) + 1


@dataclasses.dataclass(frozen=True)
class Translation(Task):
    """Say an English verse in Spanish.

    Inputs are the start token and the Spanish ids, targets the Spanish ids and the end token; the extras are
    `source`, the English ids and the end token, and `source_segment_ids`, 1 on it and 0 on padding. Verses of more
    than `length` - 1 ids in either language are left out.

    `corpus` = "installed": the 31,084 verses of the packages sword-text-kjv and sword-text-sparv, in `folder` or where
    SWORD's modules usually lie; "slice": the 514 verses of Genesis 1 to 20 that come with this package; "auto": the
    installed ones, or the slice where they are not there, which is logged as a warning. Both are in the public domain.

    Splits (88% train, 6% validation, 6% test) go by the hash of the English verse, so that no source sentence is in
    two of them. One vocabulary for both languages is learned from all training verses, whatever their length.

    Attributes:
      length: time steps of source and target, the end token counted.
      vocab_size: ids of both languages together, the three special ones counted; a corpus too small for so many
        leaves the last ones unused.
      corpus: "auto", "installed" or "slice".
      folder: of SWORD's modules; "" looks where they usually are.

    Raises:
      ValueError: a setting out of range, named; verses that are not installed (naming the packages).

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
        if not isinstance(self.folder, str):
            raise ValueError(f"folder must be a text, got {self.folder!r}")
        if self.folder and self.corpus == "slice":
            raise ValueError(f"folder must be '' where corpus is 'slice', which has none, got {self.folder!r}")

    @property
    def resolved(self) -> Mapping[str, str]:
        """Which verses "auto" means here: the vocabulary is learned from them."""
        return {"corpus": "installed" if self._root() else "slice"}

    @property
    def num_classes(self) -> int:
        """Targets have the ids of inputs."""
        return self.vocab_size

    @property
    def extras(self) -> Mapping[str, Extra]:
        """The English side: ids, and 1 where they are not padding."""
        return {
            "source": Extra((self.length,), "int32", self.vocab_size),
            "source_segment_ids": Extra((self.length,), "int32", 2),
        }

    @property
    def chance(self) -> None:
        """None: a translation is not one constant answer."""
        return None

    @property
    def byte_pairs(self) -> BytePairs:
        """The encoding of both languages, learned from the training verses."""
        return _learn(self._root(), self.vocab_size - SPECIAL)

    @property
    def origin(self) -> str:
        """Which verses are used, in words."""
        root = self._root()
        count = f"{sum(len(_split(root, split)) for split in SPLITS):,} verses"
        return f"{count} of {' and '.join(PACKAGES)}" if root else f"{count} of Genesis 1 to 20, kept in the package"

    def encode(self, text: str) -> list[int]:
        """Ids of a text of either language, without start and end tokens."""
        return [SPECIAL + i for i in self.byte_pairs.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the end token or the first padding; ids never learned say nothing."""
        pairs, said = self.byte_pairs, []
        for number in map(int, ids):
            if number in (PADDING, END):
                break
            if SPECIAL <= number < SPECIAL + pairs.size:
                said.append(number - SPECIAL)
        return pairs.decode(said)

    def pairs(self, split: str) -> tuple[Pair, ...]:
        """The verses of a split that fit, in the order of `source`."""
        check_choice("split", split, SPLITS)
        every = _encode_split(self._root(), self.vocab_size - SPECIAL, split)
        return tuple(pair for pair in every if pair.length <= self.length)

    def source(self, split: str, seed: int) -> "_Verses":
        """The verses of a split; the seed plays no part."""
        return _Verses(self.pairs(split), self.length)

    def _root(self) -> str:
        """The folder of the modules, or "" for the slice."""
        root = "" if self.corpus == "slice" else find_modules(self.folder) or ""
        if not root and (self.corpus == "installed" or self.folder):
            raise ValueError(
                f"task.folder {self.folder!r} holds no verses: install them (apt-get install {' '.join(PACKAGES)}) "
                "or set task.folder to where SWORD's modules lie; task.corpus='slice' runs without"
            )
        if not root and self.corpus == "auto":
            _warn()
        return root


class _Verses:
    """The examples of a split's verses."""

    endless = False

    def __init__(self, pairs: Sequence[Pair], length: int):
        self._pairs = pairs
        self._length = length

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"verse number must be in [0, {len(self)}), got {index}")
        _, source, target = self._pairs[index]
        used = len(target) + 1
        rest = self._length - used
        weights = np.pad(np.ones(used, np.float32), (0, rest))
        inputs = np.pad(np.array([START, *target], np.int32), (0, rest))
        targets = np.pad(np.array([*target, END], np.int32), (0, rest))
        read = np.pad(np.array([*source, END], np.int32), (0, self._length - len(source) - 1))
        return {
            **example(inputs, targets, weights, used),
            "source": read,
            "source_segment_ids": (np.arange(self._length) <= len(source)).astype(np.int32),
        }


@functools.cache
def _warn() -> None:
    # once a process
    logging.getLogger(__name__).warning(
        "task translation: %s are not installed (apt-get install %s); 514 verses of Genesis are used instead",
        " and ".join(PACKAGES),
        " ".join(PACKAGES),
    )


def _split_of(english: str) -> str:
    number = int.from_bytes(hashlib.sha256(english.encode()).digest()[:8], "big") % 100
    return "test" if number < TEST_SHARE else "validation" if number < VALIDATION_SHARE else "train"


@functools.cache
def _split(root: str, split: str) -> tuple[Verse, ...]:
    verses = read_modules(root) if root else read_slice()
    return tuple(verse for verse in verses if _split_of(verse.english) == split)


@functools.lru_cache(maxsize=4)
def _learn(root: str, size: int) -> BytePairs:
    return train_bpe((text for verse in _split(root, "train") for text in verse), size)


# Some 30,000 verses of 70 ids: 50 MB as tuples.
@functools.lru_cache(maxsize=6)
def _encode_split(root: str, size: int, split: str) -> tuple[Pair, ...]:
    encoding = _learn(root, size)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(SPECIAL + i for i in encoding.encode(text))

    return tuple(Pair(verse, *map(encode, verse)) for verse in _split(root, split))
