"""Input pipeline: order, exact resume, processes, single passes, checks of batches."""

import dataclasses
import itertools
import multiprocessing
import threading

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from memformer.data.source import Extra, FiniteSource, make_example
from memformer.tasks import Parity, Swap, Task
from memformer.training.curriculum import Curriculum
from memformer.training.input import batch_shapes, check_batch, make_loader
from memformer.training.sharding import batch_layout, batch_sharding, global_batch, make_mesh
from tests.processes import FORKED

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


@dataclasses.dataclass(frozen=True)
class Ragged(Finite):
    """Example i has i + 2 steps."""

    def source(self, split: str, seed: int):
        return FiniteSource(lambda i: make_example(np.zeros(i + 2), np.zeros(i + 2), np.ones(i + 2)), self.size)


def take(count: int, task=SWAP, split="train", **settings):
    loader = make_loader(task, split, **{"batch_size": 6, "seed": 0, **settings})
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches, loader.position


def first_inputs(batches) -> list[list[int]]:
    return [batch["inputs"][:, 0].tolist() for batch in batches]


def covered(slices: list[slice], size: int) -> list[int]:
    """The numbers in at least one of the slices."""
    return sorted({number for part in slices for number in range(*part.indices(size))})


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


MESHES = [
    {"data": 8},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "context": 4},
    {"data": 2, "context": 2, "tensor": 2},
    {"context": 8},
]


def layouts(task, batch_size, sizes, processes):
    """The mesh of eight devices, and the layout of each process where neighbouring devices share a process."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes)
    devices = np.array(jax.devices()).reshape(processes, -1)
    return mesh, [batch_layout(batch_shapes(task, batch_size), mesh, list(own)) for own in devices]


@pytest.mark.parametrize("task", [SWAP, Finite(size=30)], ids=lambda task: task.name)
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_processes_share_the_same_batches(task, processes, sizes):
    """Every process reads the rows and keeps the steps that its devices address, of the same global batches."""
    task = dataclasses.replace(task, start="none") if task is SWAP else task
    whole, _ = take(2, task=task, position=8, batch_size=8)
    mesh, parts = layouts(task, 8, sizes, processes)
    for part, devices in zip(parts, np.array(jax.devices()).reshape(processes, -1), strict=True):
        batches, position = take(2, task=task, position=8, batch_size=8, rows=part.rows, place=part.keep)
        assert position == 24
        for batch, want in zip(batches, whole, strict=True):
            for name, array in want.items():
                indices = batch_sharding(name, array.shape, mesh).devices_indices_map(array.shape)
                rows, steps = (covered([indices[d][axis] for d in devices], array.shape[axis]) for axis in (0, 1))
                assert part.rows.tolist() == rows
                np.testing.assert_array_equal(batch[name], array[rows][:, steps], strict=True)


def test_rows_that_are_no_neighbours():
    """A process whose devices lie apart in the mesh holds rows 0, 1, 4 and 5."""
    mesh = make_mesh({"data": 4, "fsdp": 1, "context": 2, "tensor": 1})
    devices = [*mesh.devices[0].flat, *mesh.devices[2].flat]
    part = batch_layout(batch_shapes(SWAP, 8), mesh, devices)
    assert part.rows.tolist() == [0, 1, 4, 5]
    batch = take(1, batch_size=8, rows=part.rows)[0][0]
    assert_same([batch], [{name: array[[0, 1, 4, 5]] for name, array in take(1, batch_size=8)[0][0].items()}])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_batches_reach_the_devices(sizes):
    task = dataclasses.replace(SWAP, start="none")
    mesh, (layout,) = layouts(task, 8, sizes, 1)
    want = take(1, task=task, batch_size=8)[0][0]
    got = take(1, task=task, batch_size=8, rows=layout.rows, place=layout.place)[0][0]
    assert_same([{name: np.asarray(array) for name, array in got.items()}], [want])
    for name, array in got.items():
        assert array.sharding == batch_sharding(name, array.shape, mesh)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[name][shard.index])


@dataclasses.dataclass(frozen=True)
class Watched(Finite):
    """Notes the examples that are read."""

    asked: list = dataclasses.field(default_factory=list, compare=False)

    def source(self, split: str, seed: int):
        def make(index):
            self.asked.append(index)
            return make_example(np.full(2, index), np.zeros(2), np.ones(2))

        return FiniteSource(make, self.size)


def test_only_own_examples_are_read():
    task = Watched(size=16)
    take(2, task=task, split="test", batch_size=8, rows=[0, 1, 4, 5], prefetch=0)
    assert task.asked == [0, 1, 4, 5, 8, 9, 12, 13]


def test_batches_are_placed_in_the_background():
    threads = []

    def place(batch):
        threads.append(threading.current_thread())
        return batch

    take(2, place=place)
    assert len(threads) >= 2 and threading.main_thread() not in threads


def test_restart_with_other_processes_and_batch_size():
    whole, _ = take(1, batch_size=24)
    _, position = take(2)
    halves = [take(1, batch_size=12, position=position, rows=range(6 * p, 6 * p + 6))[0][0] for p in range(2)]
    for key in whole[0]:
        got = np.concatenate([half[key] for half in halves])
        np.testing.assert_array_equal(got, whole[0][key][12:])


def test_worker_processes_make_the_same_batches(monkeypatch):
    # Grain starts interpreters, which import for seconds; these are given their work in the same way
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKED)
    assert_same(take(5, task=Finite(), position=6, workers=2)[0], take(5, task=Finite(), position=6)[0])


def test_a_bad_example_is_refused_in_the_main_thread():
    with pytest.raises(ValueError, match="all examples of a source must have the same arrays and shapes"):
        take(1, task=Ragged())


def test_curriculum_goes_on_at_the_position():
    _, position = take(2)
    longer = SWAP.with_length(16)
    batches, position = take(1, task=longer, position=position)
    assert_same([{k: v[0] for k, v in batches[0].items()}], [longer.source("train", 0)[12]])
    assert position == 18


def test_finite_source_is_shuffled_anew_each_epoch():
    batches, _ = take(10, task=Finite(), batch_size=5)
    order = np.concatenate(first_inputs(batches)).reshape(5, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) > 1
    other, _ = take(2, task=Finite(), batch_size=5, seed=1)
    assert first_inputs(other) != first_inputs(batches[:2])


def test_evaluation_splits_keep_their_order():
    batches, _ = take(4, task=Finite(), split="validation", batch_size=5)
    assert first_inputs(batches) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2


@pytest.mark.parametrize("processes", [1, 2])
def test_single_pass_scores_every_example_once(processes):
    shares = [
        take(99, Finite(), "test", batch_size=4, repeat=False, rows=np.arange(4).reshape(processes, -1)[p])[0]
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
        ({"rows": []}, "rows must be increasing numbers below batch_size = 6, got"),
        ({"rows": [3, 2]}, "rows must be increasing numbers below batch_size = 6, got"),
        ({"rows": [5, 6]}, "rows must be increasing numbers below batch_size = 6, got"),
        ({"rows": [0.5]}, "rows must be increasing numbers below batch_size = 6, got"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
        ({"prefetch": True}, "prefetch must be an integer of at least 0, got True"),
        ({"split": "dev"}, "split must be one of 'train', 'validation', 'test', got 'dev'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"repeat": False}, "task 'swap' has an endless source, .*repeat=True"),
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


def test_a_curriculum_of_a_task_with_varied_lengths_trains_on_all_up_to_the_stages():
    options = {"enabled": True, "start": 5, "stop": 20, "factor": 2, "accuracy": 0.9}
    curriculum = Curriculum(Parity(length=40, min_length=2), options)
    assert curriculum.advance(0.95) and curriculum.task == Parity(length=10, min_length=2)
    assert Curriculum(SWAP, options).task == SWAP.with_length(5)
