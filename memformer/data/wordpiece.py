"""BERT's tokenizer: splits text into words and punctuation, and words into pieces of a vocabulary."""

import pathlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from memformer.core.checks import check, check_at_least

__all__ = ["WordPiece"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
# Longer words become [UNK].
LONGEST_WORD = 100
# CJK ideographs, each a word of its own.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """Encodes text with a BERT vocabulary.

    Control characters are removed, letters are lowercased and stripped of accents (with `lower`), and the text is split
    at spaces, punctuation and ideographs. Each word is split greedily from the left into the longest pieces of the
    vocabulary; pieces inside a word are written ##piece. A word that cannot be split completely is [UNK].

    Args:
      vocabulary: the pieces; the index of a piece is its id.
      lower: True for an uncased vocabulary.

    Raises:
      ValueError: a vocabulary without [PAD], [UNK], [CLS], [SEP] or [MASK].

    Source: BERT, arXiv 1810.04805; greedy longest match, arXiv 1609.08144 section 4.1.

    Example:
      >>> tokenizer = WordPiece([*SPECIAL, "at", "##tend", "!"])
      >>> tokenizer.pieces("Áttend!")
      ['at', '##tend', '!']
      >>> tokenizer.encode("attend !")
      ([2, 5, 6, 7, 3], [0, 0, 0, 0, 0])
    """

    def __init__(self, vocabulary: Sequence[str], *, lower: bool = True):
        self.vocabulary, self.lower = tuple(vocabulary), lower
        self.ids = {piece: place for place, piece in enumerate(self.vocabulary)}
        missing = [piece for piece in SPECIAL if piece not in self.ids]
        if missing:
            raise ValueError(f"vocabulary must contain the pieces {', '.join(SPECIAL)}; missing: {', '.join(missing)}")

    @classmethod
    def from_file(cls, path: str | pathlib.Path, *, lower: bool = True) -> "WordPiece":
        """Reads a vocab.txt with one piece per line."""
        # Only a line feed ends a line: some pieces are other line separators of Unicode.
        lines = pathlib.Path(path).read_bytes().decode("utf-8").split("\n")
        return cls([line.rstrip("\r") for line in lines[: -1 if not lines[-1] else None]], lower=lower)

    def words(self, text: str) -> list[str]:
        """Splits a text into words, punctuation marks and ideographs; special pieces stay intact.

        Example:
          >>> WordPiece(SPECIAL).words("Don't [MASK]")
          ['don', "'", 't', '[MASK]']
        """
        found: list[str] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL:
                found.append(part)
            else:
                found.extend("".join(map(_space_out, self._clean(part))).split())
        return found

    def _clean(self, text: str) -> str:
        text = "".join(map(_normalize, text))
        if not self.lower:
            return text
        apart = unicodedata.normalize("NFD", text)
        # Character by character: lowercasing a whole word turns a final sigma into another letter.
        return "".join(c.lower() for c in apart if unicodedata.category(c) != "Mn")

    def pieces(self, text: str) -> list[str]:
        """Pieces of a text, without [CLS] and [SEP]."""
        return [piece for word in self.words(text) for piece in self._cut(word)]

    def _cut(self, word: str) -> list[str]:
        if word in SPECIAL:
            return [word]
        if len(word) > LONGEST_WORD:
            return ["[UNK]"]
        cut: list[str] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else "##" + word[start:end]
                if piece in self.ids:
                    break
            else:
                return ["[UNK]"]
            cut.append(piece)
            start = end
        return cut

    def encode(self, text: str, pair: str | None = None, *, length: int | None = None) -> tuple[list[int], list[int]]:
        """Ids of [CLS] text [SEP] (pair [SEP]), and their token types: 0 for the text, 1 for the pair.

        Args:
          text: the first text.
          pair: the second text, or None.
          length: maximum number of ids, which truncates the text; None for no limit.

        Raises:
          ValueError: a length below 3, or a length together with a pair.
        """
        pieces = self.pieces(text)
        if length is not None:
            check(pair is None, "length", "None with a pair", length)
            pieces = pieces[: check_at_least("length", length, 3) - 2]
        first = ["[CLS]", *pieces, "[SEP]"]
        second = [] if pair is None else [*self.pieces(pair), "[SEP]"]
        return [self.ids[piece] for piece in first + second], [0] * len(first) + [1] * len(second)

    def batch(self, texts: Sequence[str], *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T] and segment_ids [B, T] (1, and 0 for padding) of texts, padded to the longest.

        Args:
          texts: one text per row.
          length: maximum number of ids per text; None for no limit.

        Raises:
          ValueError: `texts` is empty.

        Example:
          >>> ids, segments = WordPiece([*SPECIAL, "a", "b"]).batch(["a b", "b"])
          >>> segments
          array([[1, 1, 1, 1],
                 [1, 1, 1, 0]], dtype=int32)
        """
        rows = [self.encode(text, length=length)[0] for text in texts]
        if not rows:
            raise ValueError("texts must contain at least one text")
        ids = np.full((len(rows), max(map(len, rows))), self.ids["[PAD]"], np.int32)
        segments = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], segments[i, : len(row)] = row, 1
        return ids, segments


def _normalize(character: str) -> str:
    """Maps whitespace to a space and control characters to nothing."""
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    # Control, format, private use, surrogate; unassigned characters stay.
    if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return character


def _space_out(character: str) -> str:
    """Surrounds punctuation and ideographs with spaces."""
    code = ord(character)
    # All ASCII marks count, including those that Unicode classifies as symbols, such as $ and ^.
    mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    mark = mark or unicodedata.category(character).startswith("P")
    alone = mark or any(low <= code <= high for low, high in IDEOGRAPHS)
    return f" {character} " if alone else character
