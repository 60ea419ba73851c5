"""Byte pairs: exact round trips, training against a simple implementation, encoding against another library, errors."""

import collections

import pytest

from memformer.data.bpe import BYTES, BytePairs, split_words, train_bpe
from memformer.data.verses import read_verse_slice

TEXTS = [text for verse in read_verse_slice()[:40] for text in verse]
STRANGE = ["", " ", "a", "  two  spaces \n\n and\ttabs ", "it's 'tis we'll", "año 你好 🙂 \x00 x_1=-3.5;", TEXTS[3] * 2]


def plain_training(texts, size):
    """Training that recounts all pairs for each merge."""
    words = collections.Counter(tuple(word.encode()) for text in texts for word in split_words(text))
    merges = []
    while BYTES + len(merges) < size:
        counts = collections.Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if counts[best] < 2:
            break
        joined = collections.Counter()
        for word, times in words.items():
            out = []
            for i in word:
                if out and (out[-1], i) == best:
                    out[-1] = BYTES + len(merges)
                else:
                    out.append(i)
            joined[tuple(out)] += times
        words = joined
        merges.append(best)
    return tuple(merges)


@pytest.fixture(scope="module")
def pairs():
    return train_bpe(TEXTS, 600)


def test_training_matches_the_simple_implementation(pairs):
    assert len(pairs.merges) == 600 - BYTES
    assert pairs.merges == plain_training(TEXTS, 600)


def test_overlapping_pairs_join_from_the_left():
    for text in ("aaaa aaa aaaaa", "abababa baba", "aaabaaab"):
        assert train_bpe([text] * 3, 270).merges == plain_training([text] * 3, 270)


def test_equal_counts_go_to_the_smallest_ids():
    merges = train_bpe(["dc", "ba"] * 2, 258).merges
    assert merges == ((ord("b"), ord("a")), (ord("d"), ord("c")))
    assert merges == train_bpe(["ba", "dc"] * 2, 258).merges


def test_training_stops_where_nothing_occurs_twice():
    assert train_bpe(["abc"], 300).size == BYTES
    assert train_bpe([], 300).size == BYTES


@pytest.mark.parametrize("text", STRANGE)
def test_decoding_restores_the_text(pairs, text):
    ids = pairs.encode(text)
    assert pairs.decode(ids) == text
    assert "".join(split_words(text)) == text
    assert all(0 <= i < pairs.size for i in ids)


def test_frequent_text_is_shorter_than_its_bytes(pairs):
    ids, raw = sum(len(pairs.encode(t)) for t in TEXTS), sum(len(t.encode()) for t in TEXTS)
    assert ids < 0.55 * raw
    assert len(pairs.encode(" God")) == 1


def test_a_cut_character_is_replaced(pairs):
    assert pairs.decode("ñ".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_encoding_matches_the_library_tokenizers(pairs):
    tokenizers = pytest.importorskip("tokenizers", reason="the library tokenizers (pip) is not installed")
    # GPT-2's mapping of bytes to printable characters.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letter = {b: chr(b) if b in printable else chr(next(others)) for b in range(256)}
    spell = ["".join(letter[b] for b in spelling) for spelling in pairs.spellings]
    vocabulary = {text: i for i, text in enumerate(spell)}
    merges = [(spell[a], spell[b]) for a, b in pairs.merges]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for text in [*TEXTS, *STRANGE]:
        assert pairs.encode(text) == other.encode(text).ids, text


@pytest.mark.parametrize("merges", [((97, 256),), ((97, 98), (257, 97)), ((-1, 97),), ((97, 98, 99),)])
def test_merges_of_unknown_ids_are_refused(merges):
    with pytest.raises(ValueError, match=r"merges\[\d\] must be two ids in"):
        BytePairs(merges)


def test_a_size_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="size must be an integer of at least 256, got 255"):
        train_bpe(TEXTS, 255)


@pytest.mark.parametrize("number", [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(number):
    small = BytePairs(())
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 256\), got {number}"):
        small.decode([65, number])
