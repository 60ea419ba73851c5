"""Byte-pair encoding and its training.

A text is cut into words (with the space before them), and a word into its UTF-8 bytes; the learned merges are applied
in the order in which they were learned. Every text has an encoding, and decoding restores it exactly.
"""

import collections
import dataclasses
import functools
import heapq
import re
from collections.abc import Iterable, Sequence

from memformer.core.checks import check, check_at_least

__all__ = ["BytePairs", "split_words", "train_bpe"]

BYTES = 256

# GPT-2's pattern in the classes of `re`: English endings; letters, digits or other marks after at most one space;
# whitespace.
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")

# Merges never cross words, and a language has few different words: the largest corpus here has 40,000.
CACHED_WORDS = 2**17


def split_words(text: str) -> list[str]:
    """Splits a text into the pieces that merges never cross; joined, they are the text.

    Example:
      >>> split_words("Let there be light: 3 days.")
      ['Let', ' there', ' be', ' light', ':', ' 3', ' days', '.']
    """
    return WORD.findall(text)


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A byte-pair encoding: ids 0...255 are the bytes, 256 + i is the result of merge i.

    Attributes:
      merges: pairs of ids in the order learned; a merge may contain bytes and earlier merges only.

    Raises:
      ValueError: a merge of an id that is neither a byte nor an earlier merge.

    Source: arXiv 1508.07909; on bytes as in GPT-2 (Radford et al. 2019, section 2.2).

    Example:
      >>> pairs = BytePairs(((97, 98), (256, 97)))
      >>> pairs.encode("ababa"), pairs.decode([257, 98])
      ([256, 257], 'abab')
    """

    merges: tuple[tuple[int, int], ...]

    def __post_init__(self):
        for place, pair in enumerate(self.merges):
            if len(pair) != 2 or not all(0 <= part < BYTES + place for part in pair):
                raise ValueError(f"merges[{place}] must be two ids in [0, {BYTES + place}), got {pair!r}")

    @property
    def size(self) -> int:
        """Number of ids."""
        return BYTES + len(self.merges)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [i for word in split_words(text) for i in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; invalid UTF-8, such as a cut character, becomes the replacement character.

        Raises:
          ValueError: an id outside [0, size).
        """
        numbers = list(ids)
        for number in numbers:
            check(0 <= number < self.size, "ids", f"in [0, {self.size})", number)
        return b"".join(self.spellings[number] for number in numbers).decode("utf-8", "replace")

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """Bytes of each id."""
        known = [bytes([i]) for i in range(BYTES)]
        for left, right in self.merges:
            known.append(known[left] + known[right])
        return tuple(known)

    @functools.cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        # Of duplicate merges the first applies.
        return {pair: BYTES + i for i, pair in reversed(list(enumerate(self.merges)))}

    @functools.cached_property
    def _encode_word(self):
        return functools.lru_cache(CACHED_WORDS)(self._merge_word)

    def _merge_word(self, word: str) -> tuple[int, ...]:
        ids = tuple(word.encode())
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:], strict=False), key=lambda pair: self._ranks.get(pair, self.size))
            if pair not in self._ranks:
                break
            ids = _join(ids, pair, self._ranks[pair])
        return ids


def train_bpe(texts: Iterable[str], size: int) -> BytePairs:
    """Learns merges from texts until there are `size` ids, or no pair occurs twice.

    Each merge joins the most frequent pair of the current words; ties go to the pair with the smallest ids, which makes
    training deterministic. Counts are kept per distinct word and updated only where a merge applies.

    Args:
      texts: the corpus.
      size: number of ids, the 256 bytes included.

    Raises:
      ValueError: size below 256.

    Source: arXiv 1508.07909, algorithm 1.

    Example:
      >>> pairs = train_bpe(["low lower lowest"], 260)
      >>> [pairs.spellings[i] for i in range(256, pairs.size)]
      [b'lo', b'low', b' low', b' lowe']
    """
    check_at_least("size", size, BYTES)
    counted = collections.Counter(word for text in texts for word in split_words(text))
    words = [tuple(word.encode()) for word in counted]
    times = list(counted.values())
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    places: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for place, word in enumerate(words):
        _count(word, times[place], place, counts, places)
    # Heap entries are valid only while they agree with the counts.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while BYTES + len(merges) < size and heap:
        less, best = heapq.heappop(heap)
        if counts.get(best) != -less:
            continue
        if counts[best] < 2:
            break
        changed: set[tuple[int, int]] = set()
        for place in list(places[best]):
            changed |= _count(words[place], -times[place], place, counts, places)
            words[place] = _join(words[place], best, BYTES + len(merges))
            changed |= _count(words[place], times[place], place, counts, places)
        for pair in changed & counts.keys():
            heapq.heappush(heap, (-counts[pair], pair))
        merges.append(best)
    return BytePairs(tuple(merges))


def _join(ids: Sequence[int], pair: tuple[int, int], joined: int) -> tuple[int, ...]:
    """Replaces every `pair`, from left to right, by `joined`."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        if at + 1 < len(ids) and ids[at] == pair[0] and ids[at + 1] == pair[1]:
            out.append(joined)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return tuple(out)


def _count(
    word: Sequence[int],
    times: int,
    place: int,
    counts: collections.Counter[tuple[int, int]],
    places: dict[tuple[int, int], set[int]],
) -> set[tuple[int, int]]:
    """Adds the pairs of a word to the counts, or removes them where `times` is negative; returns the pairs."""
    pairs = list(zip(word, word[1:], strict=False))
    for pair in pairs:
        counts[pair] += times
        if times > 0:
            places[pair].add(place)
        else:
            places[pair].discard(place)
            if counts[pair] == 0:
                del counts[pair], places[pair]
    return set(pairs)
