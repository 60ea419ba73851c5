"""Examples from token stores: windows over the stream of tokens, whole documents packed into bins, and mixtures.

All give random access to example i, read from mapped shards when it is asked for: a run resumes at any position, on
any number of hosts. Grain's packing is a stream that can only be resumed by the hosts that started it, so bins are
planned here, once, from the lengths of the documents.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from memformer.core.checks import check, check_at_least, check_number
from memformer.data.packing import make_window
from memformer.data.source import ENDLESS, Example, FiniteSource, RandomAccessSource
from memformer.data.token_store import TokenSplit

__all__ = ["MixedSource", "PackedTokens", "TokenWindows", "pack_lengths"]


class TokenWindows(FiniteSource):
    """Windows of `length` steps over all tokens of a split, each of which is scored once.

    A window ends where it is full, in the middle of a document too; the next one then begins with the token before it
    as input. Each document is a segment, in which positions count from 0.

    Args:
      split: from `TokenStore.split`.
      length: time steps per window.
      start: id before the first token of a document (`TokenStore.start`).
    """

    def __init__(self, split: TokenSplit, length: int, start: int):
        self._split, self._start = split, start
        self._steps = check_at_least("length", length, 1)
        self._tokens = split.count("tokens")
        super().__init__(self._window, -(-self._tokens // self._steps))

    def _window(self, index: int) -> Example:
        first = index * self._steps
        stop = min(first + self._steps, self._tokens)
        starts: list[np.ndarray] = []
        unscored = np.zeros(stop - first, bool)
        for shard, at, a, b in self._split.overlaps(first, stop):
            # documents that end behind a: the first may begin before it
            low = int(np.searchsorted(shard.ends, a - at, side="right"))
            high = int(np.searchsorted(shard.ends, b - at, side="left"))
            begins = at + np.concatenate([[shard.ends[low - 1] if low else 0], shard.ends[low:high]])
            starts.append(begins[begins >= a] - first)
            if shard.prompts is not None:
                for begin, size in zip(begins, shard.prompts[low : high + 1], strict=True):
                    unscored[max(begin, a) - first : max(min(begin + size, b), a) - first] = True
        tokens = self._split.read(max(first - 1, 0), stop)
        previous, targets = (int(tokens[0]), tokens[1:]) if first else (self._start, tokens)
        return make_window(targets, np.concatenate(starts), previous, self._steps, self._start, unscored)


class PackedTokens(FiniteSource):
    """Whole documents packed into bins of `length` steps; only a document that is longer is cut.

    Each document goes into the fullest bin that has room for it (best fit), in the order of the split. A bin is
    padded; a document, or each part of one, is a segment.

    Args:
      split: from `TokenStore.split`.
      length: time steps per bin.
      start: id before the first token of a document (`TokenStore.start`).

    Attributes:
      efficiency: share of the steps that are no padding.
    """

    def __init__(self, split: TokenSplit, length: int, start: int):
        self._split, self._start = split, start
        self._steps = check_at_least("length", length, 1)
        begins, sizes, prompts = _list_documents(split)
        # parts of at most `length` tokens, in order
        counts = -(-sizes // self._steps)
        document = np.repeat(np.arange(len(sizes)), counts)
        offsets = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * self._steps
        self._begins = begins[document] + offsets
        self._sizes = np.minimum(sizes[document] - offsets, self._steps)
        self._prompts = np.clip(prompts[document] - offsets, 0, self._sizes)
        self._whole = offsets == 0
        self._order, self._ends = pack_lengths(self._sizes, self._steps)
        super().__init__(self._bin, len(self._ends))
        self.efficiency = float(self._sizes.sum()) / max(len(self._ends) * self._steps, 1)

    def _bin(self, index: int) -> Example:
        parts = self._order[self._ends[index - 1] if index else 0 : self._ends[index]]
        tokens, unscored, starts, firsts = [], [], [], []
        at = 0
        for part in parts:
            begin, size = int(self._begins[part]), int(self._sizes[part])
            tokens.append(self._split.read(begin, begin + size))
            unscored.append(np.arange(size) < self._prompts[part])
            starts.append(at)
            # the rest of a long document begins with the token before it
            firsts.append(self._start if self._whole[part] else int(self._split.read(begin - 1, begin)[0]))
            at += size
        example = make_window(
            np.concatenate(tokens), np.array(starts), self._start, self._steps, self._start, np.concatenate(unscored)
        )
        example["inputs"][starts] = firsts
        return example


def _list_documents(split: TokenSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, number of tokens, and unscored tokens of each document of a split."""
    begins, sizes, prompts = [], [], []
    for at, ends, unscored in split.documents():
        lengths = np.diff(ends, prepend=0)
        begins.append(at + ends - lengths)
        sizes.append(lengths)
        prompts.append(np.zeros(len(ends), np.int64) if unscored is None else unscored.astype(np.int64))
    none = [np.zeros(0, np.int64)]
    return np.concatenate(begins or none), np.concatenate(sizes or none), np.concatenate(prompts or none)


def pack_lengths(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into bins by best fit: each goes into the fullest bin with room for it, else into a new one.

    Args:
      sizes: of the items, between 1 and `capacity`.
      capacity: of a bin.

    Returns:
      The items in the order of their bins, and where each bin ends in it.

    Example:
      >>> order, ends = pack_lengths(np.array([5, 3, 4, 2]), 8)
      >>> np.split(order, ends[:-1])
      [array([0, 1]), array([2, 3])]
    """
    fits = len(sizes) == 0 or (int(sizes.min()) >= 1 and int(sizes.max()) <= capacity)
    check(fits, "sizes", f"in [1, {capacity}]", sizes)
    bins: list[list[int]] = []
    # open bins by the room that they have, and a bit for each room that occurs: the lowest one that is large enough
    # is found in a few operations on one large integer
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for item, size in enumerate(sizes.tolist()):
        large = rooms >> size
        if large:
            room = size + (large & -large).bit_length() - 1
            place = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[place].append(item)
        else:
            room, place = capacity, len(bins)
            bins.append([item])
        left = room - size
        if left:
            by_room[left].append(place)
            rooms |= 1 << left
    order = np.fromiter((item for held in bins for item in held), np.int64, len(sizes))
    return order, np.cumsum([len(held) for held in bins], dtype=np.int64)


class MixedSource:
    """Endless mixture of finite sources by weight.

    Every prefix holds each source in its share, to within an example; the shares are those of the weights, rounded to
    a hundredth of the smallest. A source is shuffled anew in each of its epochs. Example i depends on the seed and i
    alone.

    Args:
      sources: stored sources, none empty.
      weights: share of each source, positive; they need not add up to 1.
      seed: of the shuffle; None keeps the order of the sources.

    Raises:
      ValueError: an empty source, or weights that do not fit.
    """

    endless = True

    def __init__(self, sources: Sequence[RandomAccessSource], weights: Sequence[float], seed: int | None):
        check(len(weights) == len(sources), "weights", f"one number per source, {len(sources)}", weights)
        for weight in weights:
            check_number("weights", weight, above=0)
        sizes = [len(source) for source in sources]
        check(all(sizes), "sources", "none empty", sizes)
        self._sources, self._seed = tuple(sources), seed
        # Grain counts in whole numbers; it multiplies them so that the smallest is 100, as it is here
        self._shares = [round(weight * 100 / min(weights)) for weight in weights]
        self._weights = [share / sum(self._shares) for share in self._shares]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        return self._mixed[int(index)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mixed"}

    @functools.cached_property
    def _mixed(self) -> Any:
        import grain

        parts = []
        for number, source in enumerate(self._sources):
            part = grain.MapDataset.source(source)
            # sources of one size would otherwise be shuffled alike
            part = part if self._seed is None else part.shuffle(seed=(self._seed + 7919 * number) % 2**32)
            parts.append(part.repeat())
        return grain.MapDataset.mix(parts, self._shares)

    def epochs(self, position: int) -> tuple[float, ...]:
        """Number of passes over each source after the first `position` examples."""
        return tuple(
            position * weight / len(source) for source, weight in zip(self._sources, self._weights, strict=True)
        )
