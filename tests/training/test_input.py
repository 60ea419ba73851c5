"""Input pipeline: order, exact resume, processes, single passes, checks of batches."""

import dataclasses
import itertools

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from memformer.data.source import Extra, make_example
from memformer.tasks import Swap, Task
from memformer.training.input import check_batch, make_loader
from memformer.training.sharding import global_batch, make_mesh

SWAP = Swap(length=8)


class Numbers:
    """A finite source: example i holds the number i."""

    endless = False

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return make_example(np.full(2, index), np.zeros(2), np.ones(2))


@dataclasses.dataclass(frozen=True)
class Finite(Task):
    length: int = 2
    size: int = 10
    name = "finite"
    vocab_size = 100
    num_classes = 2

    def source(self, split: str, seed: int) -> Numbers:
        return Numbers(self.size)


def take(count: int, task=SWAP, split="train", **settings):
    loader = make_loader(task, split, **{"batch_size": 6, "seed": 0, **settings})
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches, loader.position


def numbers(batches) -> list[list[int]]:
    return [batch["inputs"][:, 0].tolist() for batch in batches]


def assert_same(got, want):
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        assert sorted(g) == sorted(w)
        for key in w:
            np.testing.assert_array_equal(g[key], w[key], err_msg=key, strict=True)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_the_examples_in_order(prefetch):
    batches, position = take(3, prefetch=prefetch)
    source = SWAP.source("train", 0)
    want = [{k: np.stack([source[6 * b + r][k] for r in range(6)]) for k in batches[0]} for b in range(3)]
    assert_same(batches, want)
    assert position == 18


@pytest.mark.parametrize("task", [SWAP, Finite()], ids=lambda task: task.name)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_position_resumes_with_the_same_bits(task, prefetch):
    whole, _ = take(7, task=task, prefetch=prefetch)
    first, position = take(3, task=task, prefetch=prefetch)
    rest, _ = take(4, task=task, position=position, prefetch=prefetch)
    assert_same(first + rest, whole)


@pytest.mark.parametrize("task", [SWAP, Finite()], ids=lambda task: task.name)
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_same_batches(task, processes):
    whole, _ = take(4, task=task, position=6)
    shares = [take(4, task=task, position=6, process_index=p, process_count=processes) for p in range(processes)]
    joined = [
        {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]}
        for batches in zip(*(share[0] for share in shares), strict=True)
    ]
    assert_same(joined, whole)
    assert {position for _, position in shares} == {30}


def test_restart_with_other_processes_and_batch_size():
    whole, _ = take(1, batch_size=24)
    _, position = take(2)
    halves = [take(1, batch_size=12, position=position, process_index=p, process_count=2)[0][0] for p in range(2)]
    for key in whole[0]:
        got = np.concatenate([half[key] for half in halves])
        np.testing.assert_array_equal(got, whole[0][key][12:])


def test_curriculum_goes_on_at_the_position():
    _, position = take(2)
    longer = SWAP.with_length(16)
    batches, position = take(1, task=longer, position=position)
    assert_same([{k: v[0] for k, v in batches[0].items()}], [longer.source("train", 0)[12]])
    assert position == 18


def test_finite_source_is_shuffled_anew_each_epoch():
    batches, _ = take(10, task=Finite(), batch_size=5)
    order = np.concatenate(numbers(batches)).reshape(5, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) > 1
    other, _ = take(2, task=Finite(), batch_size=5, seed=1)
    assert numbers(other) != numbers(batches[:2])


def test_evaluation_splits_keep_their_order():
    batches, _ = take(4, task=Finite(), split="validation", batch_size=5)
    assert numbers(batches) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2


@pytest.mark.parametrize("processes", [1, 2])
def test_single_pass_scores_every_example_once(processes):
    shares = [
        take(99, Finite(), "test", batch_size=4, repeat=False, process_index=p, process_count=processes)[0]
        for p in range(processes)
    ]
    assert {len(batches) for batches in shares} == {3}
    batches = sum(shares, [])
    scored = sum((b["inputs"][:, 0][b["loss_weights"][:, 0] > 0].tolist() for b in batches), [])
    assert sorted(scored) == list(range(10))
    assert sum(int(np.sum(b["segment_ids"] == 0)) for b in batches) == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 6.0}, "batch_size must be an integer of at least 1, got 6.0"),
        ({"position": -1}, "position must be an integer of at least 0, got -1"),
        ({"process_count": 4}, "batch_size must be a multiple of process_count = 4, got 6"),
        ({"process_index": 2, "process_count": 2}, "process_index must be below process_count = 2, got 2"),
        ({"prefetch": True}, "prefetch must be an integer of at least 0, got True"),
        ({"split": "dev"}, "split must be one of 'train', 'validation', 'test', got 'dev'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"repeat": False}, "repeat must be True for task 'swap'"),
        ({"task": Finite(size=0)}, "the train split of task 'finite' holds no example"),
        ({"task": Finite(), "repeat": False, "position": 12}, "position must be below the 12 examples"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        take(1, **settings)


def spoiled(**changes):
    batch = {key: array.copy() for key, array in take(1)[0][0].items()}
    for key, change in changes.items():
        batch[key] = change(batch[key])
    return batch


def put(value, row=0, column=-1):
    def change(array):
        array[row, column] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inputs": lambda x: x.astype(np.int64)}, r"inputs must be int32 \(6, 13\), got int64 \(6, 13\)"),
        ({"positions": lambda x: x[:, 1:]}, r"positions must be int32 \(6, 13\), got int32 \(6, 12\)"),
        ({"extra": lambda x: x}, "a batch must hold inputs, targets, loss_weights, segment_ids, positions"),
        ({"inputs": put(15)}, r"inputs must lie in \[0, 15\), got .* to 15"),
        ({"targets": put(5)}, r"targets must lie in \[0, 5\)"),
        ({"positions": put(13)}, r"positions must lie in \[0, 13\)"),
        ({"segment_ids": put(-1)}, r"segment_ids must lie in \[0, 14\), got -1"),
        ({"loss_weights": put(np.nan)}, "loss_weights must be finite"),
        ({"loss_weights": put(-0.5)}, "loss_weights must not be negative"),
        ({"segment_ids": put(0)}, r"loss_weights must be 0 where segment_ids is 0 \(padding\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_bad_batch_is_refused(changes, message):
    batch = spoiled()
    check_batch(batch, SWAP, 6)
    if "extra" in changes:
        batch["extra"] = batch["inputs"]
    else:
        batch = spoiled(**changes)
    with pytest.raises(ValueError, match=message):
        check_batch(batch, SWAP, 6)


@dataclasses.dataclass(frozen=True)
class Answers(Task):
    """Bits to answer about a picture."""

    name = "answers"
    loss = "bits"
    length: int = 3
    features = 2
    num_classes = 4
    extras = {"picture": Extra((4, 6), "float32"), "source": Extra((8,), "int32", 9)}

    def batch(self, rows: int):
        bits = np.random.default_rng(0).integers(2, size=(rows, 3, 4)).astype(np.float32)
        one = make_example(np.zeros((3, 2)), bits[0], np.ones(3))
        batch = {key: np.stack([array] * rows) for key, array in one.items()}
        extras = {"picture": np.zeros((rows, 4, 6), np.float32), "source": np.full((rows, 8), 8, np.int32)}
        return {**batch, "targets": bits, **extras}


def test_extras_and_bits_are_checked():
    task = Answers()
    batch = task.batch(2)
    check_batch(batch, task, 2)
    bad = {
        "source must lie in": {"source": batch["source"] + 1},
        "source must be int32": {"source": batch["source"][:, 1:]},
        "picture must be finite": {"picture": batch["picture"] * np.float32(np.nan)},
        "targets must be 0 or 1": {"targets": batch["targets"] / 2},
        "targets must be float32": {"targets": batch["targets"][..., 0]},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            check_batch({**batch, **change}, task, 2)
    del batch["picture"]
    with pytest.raises(ValueError, match="a batch must hold .*picture"):
        check_batch(batch, task, 2)


def test_only_arrays_of_time_are_split_over_context():
    mesh = make_mesh({"data": 2, "fsdp": 1, "context": 4, "tensor": 1})
    arrays = global_batch({**Answers().batch(4), "positions": np.zeros((4, 8), np.int32)}, mesh)
    assert arrays["positions"].sharding.spec == PartitionSpec(("data", "fsdp"), "context")
    assert all("context" not in arrays[name].sharding.spec for name in ("source", "picture"))
