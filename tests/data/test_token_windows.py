"""Windows, bins and mixtures over token stores: every token once, prompts unscored, weights, epochs, any position."""

import numpy as np
import pytest

from memformer.data.corpus import wrap_source
from memformer.data.source import FiniteSource
from memformer.data.token_store import TokenStore
from memformer.data.token_windows import MixedSource, PackedTokens, TokenWindows, pack_lengths
from memformer.data.tokenization import tokenize_corpus

START = 256


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Documents of 2 to 120 bytes, half of them with a prompt, in several shards."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(300):
        text = "".join(map(chr, rng.integers(97, 123, rng.integers(1, 60))))
        prompt = {"prompt": f"{i}:" * rng.integers(1, 30), "completion": text}
        rows.append(prompt if i % 2 else text)
    return tokenize_corpus(wrap_source(rows), tmp_path_factory.mktemp("store"), shard_bytes=2000)


def documents(store: TokenStore, split: str) -> list[tuple[list[int], int]]:
    """Tokens and length of the prompt of each document, in order."""
    found, part = [], store.split(split)
    for at, ends, prompts in part.documents():
        for d, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            found.append((part.read(at + a, at + b).tolist(), 0 if prompts is None else int(prompts[d])))
    return found


def pieces(source, length: int):
    """Segments of all examples: first input, targets, weights."""
    for i in range(len(source)):
        e = source[i]
        assert all(array.shape == (length,) for array in e.values())
        inside = e["segment_ids"] > 0
        # padding stands at the end, and is zero in every array
        assert np.all(np.diff(inside.astype(int)) <= 0) and not any(np.any(array[~inside]) for array in e.values())
        for segment in range(1, e["segment_ids"].max() + 1):
            here = e["segment_ids"] == segment
            np.testing.assert_array_equal(e["positions"][here], np.arange(here.sum()))
            inputs, targets = e["inputs"][here], e["targets"][here].tolist()
            assert inputs[1:].tolist() == targets[:-1]
            yield int(inputs[0]), targets, e["loss_weights"][here].tolist()


def scored(store: TokenStore, split: str) -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of each document."""
    return [(tokens, [0.0] * prompt + [1.0] * (len(tokens) - prompt)) for tokens, prompt in documents(store, split)]


@pytest.mark.parametrize("split, length", [("train", 7), ("train", 64), ("validation", 50_000), ("test", 1)])
def test_windows_score_every_token_once(store, split, length):
    found: list[tuple[list[int], list[float]]] = []
    for first, targets, weights in pieces(TokenWindows(store.split(split), length, START), length):
        if first == START:
            found.append(([], []))
        else:
            # a document continues behind its last token
            assert found[-1][0][-1] == first
        found[-1][0].extend(targets)
        found[-1][1].extend(weights)
    assert found == scored(store, split)


@pytest.mark.parametrize("split, length", [("train", 7), ("train", 64), ("validation", 50_000), ("test", 1)])
def test_bins_score_every_token_once(store, split, length):
    want = []
    for tokens, weights in scored(store, split):
        for at in range(0, len(tokens), length):
            first = tokens[at - 1] if at else START
            want.append((first, tokens[at : at + length], weights[at : at + length]))
    assert sorted(pieces(PackedTokens(store.split(split), length, START), length)) == sorted(want)


def test_documents_that_fit_are_never_cut_in_bins(store):
    source = PackedTokens(store.split("train"), 200, START)
    assert all(first == START for first, _, _ in pieces(source, 200))
    tokens = store.split("train").count("tokens")
    assert 0.95 < source.efficiency == tokens / (200 * len(source)) <= 1
    assert len(TokenWindows(store.split("train"), 200, START)) == -(-tokens // 200)


def test_a_long_document_is_cut(tmp_path):
    store = tokenize_corpus(wrap_source(["abcdefghij"]), tmp_path, validation=0, test=0)
    source = PackedTokens(store.split("train"), 4, START)
    # the last part is the input of what follows it
    assert sorted(pieces(source, 4), key=lambda piece: piece[1]) == [
        (START, [97, 98, 99, 100], [1.0] * 4),
        (100, [101, 102, 103, 104], [1.0] * 4),
        (104, [105, 106, 256], [1.0] * 3),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_best_fit(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 33, 400)
    order, ends = pack_lengths(sizes, 32)
    assert sorted(order.tolist()) == list(range(400))
    bins = np.split(order, ends[:-1])
    # the definition, by searching all bins
    rooms: list[int] = []
    held: list[list[int]] = []
    for item, size in enumerate(sizes):
        fitting = [place for place, room in enumerate(rooms) if room >= size]
        tightest = [place for place in fitting if rooms[place] == min(rooms[p] for p in fitting)]
        place = next((p for p in tightest if held[p] == [i for i in bins[p] if i < item] and item in bins[p]), None)
        if not fitting:
            place = len(rooms)
            rooms.append(32)
            held.append([])
        assert place is not None
        rooms[place] -= size
        held[place].append(item)
    assert [list(b) for b in bins] == held
    assert all(sizes[b].sum() <= 32 for b in bins)


def test_sizes_that_do_not_fit():
    for sizes in ([0, 3], [9]):
        with pytest.raises(ValueError, match=r"sizes must be in \[1, 8\], got"):
            pack_lengths(np.array(sizes), 8)
    order, ends = pack_lengths(np.zeros(0, int), 8)
    assert len(order) == len(ends) == 0


def numbers(start: int, count: int) -> FiniteSource:
    return FiniteSource(lambda i: {"x": np.array([start + i])}, count)


def test_mixtures_keep_their_weights():
    pytest.importorskip("grain")
    source = MixedSource([numbers(0, 10), numbers(100, 30), numbers(200, 5)], [2, 1, 1], seed=3)
    drawn = np.array([source[i]["x"][0] for i in range(400)])
    for prefix in (40, 100, 399):
        counts = np.bincount(drawn[:prefix] // 100, minlength=3)
        np.testing.assert_allclose(counts, np.array([0.5, 0.25, 0.25]) * prefix, atol=1.5)
    rare = MixedSource([numbers(0, 1), numbers(100, 3)], [1e-9, 1], seed=0)
    assert sum(rare[i]["x"][0] == 0 for i in range(100)) <= 1 and rare.epochs(3)[1] == pytest.approx(1)
    # each epoch of a source is a permutation of it, and epochs differ
    small = drawn[drawn < 100].reshape(-1, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in small)
    assert len({tuple(epoch) for epoch in small}) > 10
    assert source.epochs(400) == pytest.approx((20, 100 / 30, 20))
    # any example can be drawn alone
    again = MixedSource([numbers(0, 10), numbers(100, 30), numbers(200, 5)], [2, 1, 1], seed=3)
    assert [again[i]["x"][0] for i in (399, 7)] == drawn[[399, 7]].tolist()
    other = MixedSource([numbers(0, 10), numbers(100, 30), numbers(200, 5)], [2, 1, 1], seed=4)
    assert [other[i]["x"][0] for i in range(40)] != drawn[:40].tolist()
    kept = MixedSource([numbers(0, 3), numbers(100, 3)], [1, 1], seed=None)
    assert sorted(kept[i]["x"][0] for i in range(6)) == [0, 1, 2, 100, 101, 102]


@pytest.mark.parametrize(
    "weights, counts, problem",
    [
        ([1], (3, 3), "weights must be one number per source, 2, got"),
        ([1, 0], (3, 3), "weights must be a finite number above 0, got 0"),
        ([1, 1], (3, 0), r"sources must be none empty, got \[3, 0\]"),
    ],
)
def test_mixtures_that_do_not_fit(weights, counts, problem):
    with pytest.raises(ValueError, match=problem):
        MixedSource([numbers(0, count) for count in counts], weights, 0)
