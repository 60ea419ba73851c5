"""Words over a group: label every letter with the product of the letters so far.

Source: Merrill, Petty, Sabharwal 2024, "The illusion of state in state-space models"
(arXiv 2404.08819); the swaps-only alphabet: Grazzi et al. 2024 (arXiv 2411.12537).
"""

import dataclasses
import functools
import itertools

import numpy as np

from memformer.core.checks import check_at_least, check_choice
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["GROUPS", "GroupWords", "cayley_table"]

# (order of the group, letters of the alphabet) by name.
GROUPS = {
    "S3": (6, 6),
    "S4": (24, 24),
    "S5": (120, 120),
    "S5_swaps": (120, 11),
    "S4_two": (24, 2),
    "A5_two": (60, 2),
    "S5_two": (120, 2),
    "A5": (60, 60),
    "A4xZ5": (60, 60),
    "Z60": (60, 60),
}

# In training, every 16th example is packed with words of length two.
PAIRS_EVERY = 16


@dataclasses.dataclass(frozen=True)
class GroupWords(Task):
    """Label each letter with the product x_1 x_2 ... x_t, in which the first letter acts first.

    Letters are uniform. Every 16th training example instead packs length // 2 words of length two, one per segment, in
    the order of their numbers, so that training cycles through all pairs of letters (for A5 at length 32 within 3,600
    examples).

    Ids are element numbers (see `cayley_table`), 0 for the identity; with a restricted alphabet, indices into the
    alphabet, sorted by element number.

    Attributes:
      length: letters per word.
      group: "S3", "S4", "S5", "A5", "A4xZ5", "Z60"; or one with a restricted alphabet, whose labels still range over
        the whole group: "S5_swaps" (the identity and the ten transpositions), and "S4_two", "A5_two", "S5_two" (two
        generators: the swap of the first two elements, in A5 the 3-cycle of the first three, and the cycle of all).

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = GroupWords(length=8, group="S3")
      >>> word = task.source("test", 0)[0]
      >>> bool(word["inputs"][0] == word["targets"][0]), task.num_classes
      (True, 6)
    """

    name = "group_words"
    scores = ("accuracy", "sequence_accuracy")

    length: int = 32
    group: str = "A5"

    def __post_init__(self):
        check_at_least("length", self.length, 2)
        check_choice("group", self.group, GROUPS)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return (32, 64, 128, 256, 500)

    @property
    def vocab_size(self) -> int:
        """Size of the alphabet."""
        return GROUPS[self.group][1]

    @property
    def num_classes(self) -> int:
        """Order of the group."""
        return GROUPS[self.group][0]

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw_training if split == "train" else self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        letters = rng.integers(self.vocab_size, size=self.length)
        return make_example(letters, _products(self.group, letters), np.ones(self.length))

    def _draw_training(self, rng: np.random.Generator, index: int) -> Example:
        block, place = divmod(index, PAIRS_EVERY)
        return self._draw(rng, index) if place else self._pairs(block)

    def _pairs(self, block: int) -> Example:
        """Packs the words of length two from number block * (length // 2) on, modulo their count."""
        words = self.length // 2
        letters = np.zeros((words, 2), np.int64)
        numbers = (block * words + np.arange(words)) % self.vocab_size**2
        letters[:, 0], letters[:, 1] = np.divmod(numbers, self.vocab_size)
        products = [_products(self.group, word) for word in letters]
        used = 2 * words
        padding = (0, self.length - used)
        packed = make_example(
            np.pad(letters.ravel(), padding),
            np.pad(np.ravel(products), padding),
            np.pad(np.ones(used), padding),
            used,
        )
        time = np.arange(self.length, dtype=np.int32)
        packed["segment_ids"] = packed["segment_ids"] * (time // 2 + 1)
        packed["positions"] = packed["positions"] % 2
        return packed


def _products(group: str, letters: np.ndarray) -> list[int]:
    alphabet, rows = _alphabet(group)
    product, products = 0, []
    for letter in letters.tolist():
        product = rows[product][alphabet[letter]]
        products.append(product)
    return products


@functools.cache
def _alphabet(group: str) -> tuple[list[int], list[list[int]]]:
    """Element number of every letter, and the Cayley table as lists, whose integers are fast to chain."""
    base, _, kind = group.partition("_")
    table = cayley_table(base)
    letters = list(range(len(table)))
    if kind:
        perms = _permutations(int(base[1:]), even=base[0] == "A")
        moved = [sum(i != p for i, p in enumerate(perm)) for perm in perms]
        letters = [element for element, count in enumerate(moved) if count <= 2]
    if kind == "two":
        n, first = len(perms[0]), 3 if base[0] == "A" else 2
        turns = [(*range(1, size), 0, *range(size, n)) for size in (first, n)]
        letters = sorted(perms.index(turn) for turn in turns)
    return letters, table.tolist()


@functools.cache
def cayley_table(group: str) -> np.ndarray:
    """Multiplication table of a group: entry [a, b] is the element "first a, then b".

    Elements of S_n and A_n are numbered in the lexicographic order of the permutations, those of A4xZ5 as 5 a + z,
    those of Z60 as themselves; element 0 is the identity.

    Args:
      group: "S<n>", "A<n>", "Z<n>", or two of these joined by "x".

    Returns:
      Integers [order, order]; read-only.

    Example:
      >>> cayley_table("Z60")[59, 2].item()
      1
    """
    first, *rest = group.split("x", 1)
    if rest:
        left, right = cayley_table(first), cayley_table(rest[0])
        size = len(left) * len(right)
        table = left[:, None, :, None] * len(right) + right[None, :, None, :]
        table = table.reshape(size, size)
    elif group[0] == "Z":
        order = int(group[1:])
        table = np.add.outer(np.arange(order), np.arange(order)) % order
    else:
        table = _permutation_table(int(group[1:]), even=group[0] == "A")
    table.setflags(write=False)
    return table


def _permutation_table(n: int, even: bool) -> np.ndarray:
    perms = _permutations(n, even)
    number = {perm: index for index, perm in enumerate(perms)}
    return np.array([[number[tuple(b[place] for place in a)] for b in perms] for a in perms])


def _permutations(n: int, even: bool) -> list[tuple[int, ...]]:
    return [perm for perm in itertools.permutations(range(n)) if not even or _is_even(perm)]


def _is_even(perm: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(perm, 2)) % 2 == 0
