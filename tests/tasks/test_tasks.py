"""The contract of every task: random access, determinism, disjoint splits, valid batches, clear errors."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

from memformer.data.source import SPLITS
from memformer.tasks import TASKS, make_task
from memformer.training.input import check_batch

# options of a task, and another valid length
SPECS = [
    ({"name": "swap"}, 64),
    ({"name": "swap", "objects": 8, "queries": True, "encoding": "positions", "start": "token"}, 24),
    ({"name": "reachability"}, 64),
    ({"name": "group_words", "length": 7, "group": "S3"}, 40),
    ({"name": "group_words", "group": "S5_swaps"}, 500),
    ({"name": "parity"}, 256),
    ({"name": "even_pairs"}, 256),
    ({"name": "cycle_navigation"}, 256),
    ({"name": "modular_arithmetic"}, 256),
    ({"name": "bracket_arithmetic"}, 256),
    ({"name": "reverse_string"}, 256),
    ({"name": "stack_manipulation"}, 256),
    ({"name": "mqar"}, 512),
    ({"name": "mqar", "vocab_size": 256, "length": 128, "pairs": 32}, 256),
    ({"name": "copy"}, 120),
    ({"name": "repeat_copy", "length": 3, "repeats": 3}, 8),
    ({"name": "associative_recall"}, 20),
    ({"name": "dynamic_ngrams"}, 64),
    ({"name": "priority_sort"}, 40),
    ({"name": "text", "length": 64}, 256),
    ({"name": "coreference"}, 24),
    ({"name": "coreference", "families": "held_out", "length": 15}, 16),
    ({"name": "lookup"}, 33),
    ({"name": "captions"}, 16),
    ({"name": "remember", "length": 6, "key_size": 2}, 100),
    ({"name": "rewrite", "length": 6, "queries": 3}, 100),
    ({"name": "translation", "corpus": "slice", "vocab_size": 800, "length": 96}, 128),
]
SYNTHETIC = [spec for spec in SPECS if spec[0]["name"] not in ("text", "translation")]


def label(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def assert_equal(got, want):
    assert sorted(got) == sorted(want)
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key, strict=True)


def test_every_task_has_a_row():
    # lm reads stores that its own tests write
    assert {settings["name"] for settings, _ in SPECS} | {"lm"} == set(TASKS)
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("settings, other", SPECS, ids=label)
def test_batches_are_valid_at_both_lengths(settings, other):
    task = make_task(settings)
    longer = task.with_length(other)
    assert longer.length == other
    assert (longer.vocab_size, longer.num_classes) == (task.vocab_size, task.num_classes)
    for one in (task, longer):
        for split in SPLITS:
            source = one.source(split, 0)
            # Group words pack the examples at multiples of 16.
            examples = [source[i] for i in range(20)]
            batch = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
            check_batch(batch, one, 20)
            assert all(e["loss_weights"].any() for e in examples)


@pytest.mark.parametrize("settings, other", SPECS, ids=label)
def test_examples_depend_on_seed_split_and_number_only(settings, other):
    task = make_task(settings)
    source, again = task.source("train", 5), make_task(settings).source("train", 5)
    backwards = [again[i] for i in range(19, -1, -1)][::-1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(source.__getitem__, range(20)))
    for i in range(20):
        assert_equal(source[i], backwards[i])
        assert_equal(threaded[i], backwards[i])


@pytest.mark.parametrize("settings, other", SYNTHETIC, ids=label)
def test_numbers_splits_and_seeds_draw_apart(settings, other):
    # Long enough that two equal draws are due to a shared generator, not to chance.
    task = make_task({"length": other, **{k: v for k, v in settings.items() if k != "length"}})
    if "min_length" in {field.name for field in dataclasses.fields(task)}:
        task = task.with_length(other)
    drawn = [
        b"".join(array.tobytes() for array in task.source(split, seed)[i].values())
        for split in SPLITS
        for seed in (0, 1, 2**64 - 1)
        for i in (1, 2, 2**32 + 1, 2**48 - 1)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("settings, other", SPECS, ids=label)
def test_every_split_has_examples(settings, other):
    task = make_task(settings)
    task.check_data()
    task.with_length(other).check_data()


@pytest.mark.parametrize("settings, other", SPECS, ids=label)
def test_numpy_numbers_are_accepted(settings, other):
    numbers = {key: np.int64(x) if type(x) is int else x for key, x in settings.items()}
    task = make_task(numbers).with_length(np.int32(other))
    want = make_task(settings).with_length(other)
    assert task == want
    for key, array in want.source("test", np.int64(3))[np.int64(1)].items():
        np.testing.assert_array_equal(task.source("test", 3)[1][key], array)


def test_streams_of_examples_do_not_overlap():
    """The counters of examples are 2**128 blocks apart."""
    from memformer.data.source import SyntheticSource

    source = SyntheticSource(lambda rng, i: {"x": rng.integers(2**63, size=4096)}, "train", 0)
    draws = np.concatenate([source[i]["x"] for i in range(16)])
    assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("settings, other", SPECS, ids=label)
def test_bad_options_are_named(settings, other):
    task = make_task(settings)
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'dev'"):
        task.source("dev", 0)
    with pytest.raises(ValueError, match=f"task '{task.name}' has no key 'lenght'; known keys: length"):
        make_task({**settings, "lenght": 3})
    with pytest.raises(ValueError, match="length must be an integer of at least"):
        make_task({**settings, "length": 0})
    with pytest.raises(ValueError, match="length must be an integer of at least"):
        task.with_length(12.5)
    source = task.source("test", 0)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="number must be in"):
            source[index]


def test_unknown_task_names_the_known():
    with pytest.raises(ValueError, match="task.name must be one of 'swap', .*'text', .*got 'swaps'"):
        make_task({"name": "swaps"})
    with pytest.raises(ValueError, match="task.name must be one of .*, got None"):
        make_task({})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match="seed must be an integer in"):
        make_task({"name": "swap"}).source("train", seed)


def test_tasks_are_values():
    task = make_task({"name": "swap", "length": 8})
    assert task == make_task({"name": "swap", "length": 8}) and hash(task) is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.length = 9
