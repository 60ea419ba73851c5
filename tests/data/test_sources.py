"""Sources and packing: numbers of examples, windows over documents, errors."""

import numpy as np
import pytest

from memformer.data import FiniteSource, PackedDocuments, SyntheticSource

SOURCES = {
    "synthetic": SyntheticSource(lambda rng, i: {"x": rng.integers(9, size=2)}, "train", 0),
    "finite": FiniteSource(lambda i: {"x": np.array([i])}, 3),
    "packed": PackedDocuments(np.arange(5), [2, 3], length=2, start=9),
}


@pytest.mark.parametrize("name", SOURCES)
def test_examples_by_number(name):
    source = SOURCES[name]
    one, same = source[2], source[np.int64(2)]
    assert all((one[key] == same[key]).all() for key in one)
    for number in (-1, len(source)):
        with pytest.raises(IndexError, match="example number must be in"):
            source[number]
    for number in (1.0, "1", None, float("nan")):
        with pytest.raises(TypeError, match="integer"):
            source[number]


def test_windows():
    source = PackedDocuments(np.arange(5), [2, 3], length=4, start=9)
    assert len(source) == 2
    assert source[0]["inputs"].tolist() == [9, 0, 9, 2] and source[0]["targets"].tolist() == [0, 1, 2, 3]
    assert source[0]["segment_ids"].tolist() == [1, 1, 2, 2] and source[0]["positions"].tolist() == [0, 1, 0, 1]
    assert source[1]["inputs"].tolist() == [3, 0, 0, 0] and source[1]["loss_weights"].tolist() == [1, 0, 0, 0]


def test_no_document_is_no_window():
    assert len(PackedDocuments(np.zeros(0, np.uint8), [], length=4, start=9)) == 0


@pytest.mark.parametrize("sizes", [[2, 2], [5, 0], [6, -1], []])
def test_sizes_that_do_not_add_up(sizes):
    with pytest.raises(ValueError, match="sizes must be positive, 5 in all"):
        PackedDocuments(np.arange(5), sizes, length=4, start=9)


@pytest.mark.parametrize("length", [0, -1, 1.5, True])
def test_bad_length(length):
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        PackedDocuments(np.arange(5), [5], length=length, start=9)
