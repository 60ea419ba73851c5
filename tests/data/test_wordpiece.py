"""WordPiece: cleaning, words, greedy pieces, special pieces, batches."""

import numpy as np
import pytest

from memformer.data.wordpiece import LONGEST_WORD, SPECIAL, WordPiece

TOKENIZER = WordPiece([*SPECIAL, "un", "##aff", "##able", "##a", "aff", "run", "##s", "!", "東", "$", "ß", "a", "##σ"])

# text, its pieces
PIECES = {
    "longest match first": ("unaffable", ["un", "##aff", "##able"]),
    "the rest of a word": ("runs", ["run", "##s"]),
    "a word that cannot be cut": ("unhappy runs", ["[UNK]", "run", "##s"]),
    "lower, without accents": ("ÚN Áff", ["un", "aff"]),
    "combining accents": ("u\u0301n", ["un"]),
    "punctuation apart": ("runs!un", ["run", "##s", "!", "un"]),
    "symbols of ASCII apart": ("un$a", ["un", "$", "a"]),
    "ideographs apart": ("a東un", ["a", "東", "un"]),
    "a sigma at the end": ("AΣ", ["a", "##σ"]),
    "lower, not folded": ("ß", ["ß"]),
    "spaces of every kind": ("un\ta\u00a0a\u3000a\r\n", ["un", "a", "a", "a"]),
    "control characters are nothing": ("u\x00n\u200b \ufffd", ["un"]),
    "special pieces stay whole": ("un[MASK]a [SEP]", ["un", "[MASK]", "a", "[SEP]"]),
    "others in brackets do not": ("[mask]", ["[UNK]", "[UNK]", "[UNK]"]),
    "nothing": ("  ", []),
    "long": ("a" * LONGEST_WORD, ["a"] + ["##a"] * (LONGEST_WORD - 1)),
    "too long": ("a" * (LONGEST_WORD + 1), ["[UNK]"]),
}


@pytest.mark.parametrize("case", PIECES)
def test_pieces(case):
    text, want = PIECES[case]
    assert TOKENIZER.pieces(text) == want


def test_cased_vocabularies_keep_case_and_accents():
    cased = WordPiece([*SPECIAL, "Ún", "un"], lower=False)
    assert cased.pieces("Ún Un") == ["Ún", "[UNK]"]


def test_pairs_and_lengths():
    ids, types = TOKENIZER.encode("a !", "runs")
    assert [TOKENIZER.vocabulary[i] for i in ids] == ["[CLS]", "a", "!", "[SEP]", "run", "##s", "[SEP]"]
    assert types == [0, 0, 0, 0, 1, 1, 1]
    ids, _ = TOKENIZER.encode("a ! a a", length=4)
    assert [TOKENIZER.vocabulary[i] for i in ids] == ["[CLS]", "a", "!", "[SEP]"]
    with pytest.raises(ValueError, match="length must be an integer of at least 3"):
        TOKENIZER.encode("a", length=2)


def test_batches_are_padded_at_the_end():
    ids, segments = TOKENIZER.batch(["a", "runs !"])
    assert ids.dtype == segments.dtype == np.int32
    assert ids[0].tolist() == [2, 16, 3, 0, 0] and segments.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    with pytest.raises(ValueError, match="at least one text"):
        TOKENIZER.batch([])


def test_a_vocabulary_is_read_line_by_line(tmp_path):
    # str.splitlines splits at U+2028, which is a piece of some vocabularies.
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL, "a", "\u2028", "b"]).encode())
    tokenizer = WordPiece.from_file(tmp_path / "vocab.txt")
    assert tokenizer.ids["b"] == 7 and len(tokenizer.vocabulary) == 8
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"missing: \[PAD\]"):
        WordPiece.from_file(tmp_path / "vocab.txt")
