"""The swap task: labels against an independent simulation, published constants, options."""

import itertools

import numpy as np
import pytest

from memformer.tasks import Swap, make_task

VARIANTS = [
    {"start": "none"},
    {"start": "token"},
    {"start": "objects"},
    {"start": "objects", "queries": True},
    {"start": "none", "encoding": "positions"},
    {"objects": 9, "start": "token", "encoding": "positions", "queries": True},
]


def read(task: Swap, inputs) -> list[tuple[int, int]]:
    """(time, answer) from the tokens, read one at a time."""
    n = task.objects
    pairs = list(itertools.combinations(range(n), 2))
    where = {thing: thing for thing in range(n)}
    queries = task.swap_ids
    starts = queries + n * task.queries
    answers, spelled = [], []
    for time, token in enumerate(int(i) for i in inputs):
        at = {place: thing for thing, place in where.items()}
        if token >= starts:
            continue
        if token >= queries:
            answers.append((time, at[token - queries]))
            continue
        spelled.append(token)
        if task.encoding == "positions" and len(spelled) < 2:
            continue
        a, b = pairs[token] if task.encoding == "pair" else spelled
        spelled = []
        where[at[a]], where[at[b]] = b, a
        if not task.queries:
            answers.append((time, next(thing for thing in where if where[thing] == 0)))
    return answers


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_labels_match_a_simulation(settings):
    task = make_task({"name": "swap", "length": 20, **settings})
    for index in (0, 1, 2**40):
        example = task.source("train", 3)[index]
        want = read(task, example["inputs"])
        scored = np.flatnonzero(example["loss_weights"])
        assert [(int(t), int(example["targets"][t])) for t in scored] == want
        assert len(want) == 20
        assert set(example["loss_weights"].tolist()) <= {0.0, 1.0}
        assert example["inputs"].shape == (task.steps,)
        assert example["inputs"].max() < task.vocab_size


@pytest.mark.parametrize("settings", VARIANTS[:3], ids=str)
def test_vocabulary(settings):
    task = make_task({"name": "swap", **settings})
    start = {"none": [], "token": [10], "objects": [10, 11, 12, 13, 14]}[settings["start"]]
    assert task.vocab_size == 10 + len(start)
    assert task.source("train", 0)[5]["inputs"][: len(start)].tolist() == start


def test_swaps_are_uniform():
    task = Swap(length=1000, start="none")
    source = task.source("train", 0)
    counts = np.bincount(np.concatenate([source[i]["inputs"] for i in range(50)]), minlength=10)
    # 50,000 draws of 10 pairs: the standard deviation of a count is 67.
    assert np.all(np.abs(counts - 5000) < 400)


@pytest.mark.parametrize("length, published", [(16, 25.0), (256, 20.3)])
def test_published_constant_guess(length, published):
    task = Swap(length=length)
    assert round(100 * task.chance, 1) == published
    source = task.source("test", 1)
    targets = np.stack([source[i]["targets"][5:] for i in range(2000)])
    by_class = np.bincount(targets.ravel(), minlength=5) / targets.size
    assert by_class.argmax() == 0
    assert abs(by_class[0] - task.chance) < 0.01


def test_largest_size_has_512_objects():
    task = Swap(length=1024, objects=512, encoding="positions", queries=True)
    assert (task.vocab_size, task.num_classes, task.steps) == (3 * 512, 512, 512 + 3 * 1024)
    example = task.source("train", 0)[0]
    assert [a for _, a in read(task, example["inputs"])] == example["targets"][514::3].tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"length": "16"}, "length must be an integer of at least 1, got '16'"),
        ({"objects": 2}, "objects must be an integer of at least 3, got 2"),
        ({"objects": 513}, "objects must be at most 512, got 513"),
        ({"start": "all"}, "start must be one of 'objects', 'token', 'none', got 'all'"),
        ({"encoding": "onehot"}, "encoding must be one of 'pair', 'positions', got 'onehot'"),
        ({"queries": 1}, "queries must be True or False, got 1"),
        ({"lenght": 3}, "task 'swap' has no key 'lenght'; known keys: length, objects, start"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "swap", **settings})
