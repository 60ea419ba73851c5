"""Costs read from compiled programs: loops, groups of devices in every notation, the roofline against a hand count."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memformer.training.chips import find_chip
from memformer.training.program import Collective, _axes, _instruction, _pairs, read_program
from memformer.training.roofline import Roofline, collective_seconds, roofline
from memformer.training.sharding import make_mesh

SIZES = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(SIZES)


@pytest.fixture(scope="module")
def layers(mesh):
    """Five layers x W over tensor, then a sum over all of the batch: [8, 64] by [5, 64, 64]."""

    def run(x, weights):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec("data", None)))
            return x, None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None)))
    w = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "tensor", None))
    )
    return read_program(jax.jit(run).lower(x, w).compile().as_text(), mesh)


def test_loops_are_counted(layers):
    # per device 4 of 8 rows and half of the contracted axis, five times
    assert layers.flops == 5 * 2 * 4 * 32 * 64
    assert layers.kernels == 0 and layers.bytes > 5 * 4 * 32 * 64


def test_collectives_by_axis(layers):
    """The products are summed over tensor in each layer, the result over data once."""
    found = {(c.kind, c.axes): (c.bytes, c.calls) for c in layers.collectives}
    # and the scalar, once or twice
    assert set(found) == {("all-reduce", ("tensor",)), ("all-reduce", ("data",))}
    assert 0 <= found["all-reduce", ("tensor",)][0] - 5 * 4 * 64 * 4 <= 8
    assert found["all-reduce", ("tensor",)][1] in (5, 6) and found["all-reduce", ("data",)] == (4, 1)


NOTATIONS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "replica_groups={{0,2},{4,6},{1,3},{5,7}}": ("fsdp",),
    "replica_groups=[4,2]<=[8]": ("tensor",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=[4,2]<=[4,2]T(1,0)": ("fsdp",),
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
    "replica_groups=[1,8]<=[8]": ("data", "fsdp", "tensor"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}": ("data", "fsdp"),
    "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}": ("tensor",),
    "source_target_pairs={{0,0},{1,2},{2,1},{3,3},{4,4},{5,6},{6,5},{7,7}}": ("fsdp", "tensor"),
    "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}": ("tensor",),
    "replica_groups={{0},{1}}": (),
    "replica_groups={}": ("data", "fsdp", "tensor"),
}


@pytest.mark.parametrize("text", NOTATIONS)
def test_groups_in_every_notation(text, mesh):
    axes, size = _axes(f", channel_id=1, {text}, use_global_device_ids=true", mesh)
    assert axes == NOTATIONS[text]
    assert size == (2 if "pairs" in text else 2 ** len(axes))


def test_convolutions_count_the_pairs_that_meet():
    """A product with a batch, as TPUs write it: a window that meets one element per output."""
    window, names = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}", "dim_labels=0bf_0io->0bf"
    line = f"f32[4,8,6]{{2,1,0}} convolution(%a, %b), {window}, {names}"
    step = _instruction("c", line, line)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert _pairs(step, labels, (4, 8, 5), (4, 5, 6), 4, "0") == 4
    at = [(o, w) for o in range(4) for w in range(4) if (3 * o + w) % 4 == 0 and 3 * o + w < 16]
    assert len(at) == 4


def test_roofline_of_one_layer(mesh):
    """A hand count of one layer on v5e chips: 16,384 tokens of width 4096 through a 4096 x 16384 matrix and back."""
    chip = find_chip("TPU v5 lite")
    tokens, width, hidden = 16384, 4096, 16384
    flops = 2 * 3 * 2 * tokens * width * hidden
    moved = 2 * 3 * 2 * (tokens * width + width * hidden + tokens * hidden)
    gathered = [Collective("all-gather", ("fsdp",), 2 * 2 * 2 * width * hidden, 4)]
    bound = roofline(chip, mesh, flops=flops, bytes=moved, collectives=gathered, model_flops=flops)
    assert bound.largest == "compute" and bound.seconds == flops / 197e12 and bound.mfu == 1.0
    # half of the gathered bytes comes from the other device of two
    assert bound.terms["network fsdp"] == pytest.approx(0.5 * gathered[0].bytes / 45e9)
    slow = roofline(chip, mesh, flops=flops / 100, bytes=moved, collectives=gathered, model_flops=flops / 100)
    assert slow.largest == "network" and slow.mfu < 0.2


class Place:
    platform, process_index = "tpu", 0

    def __init__(self, index, coords, slice_index=0):
        self.id, self.coords, self.slice_index = index, coords, slice_index


class Grid:
    """A mesh of v5e chips: data over rows, tensor over columns."""

    axis_names = ("data", "tensor")

    def __init__(self, rows, columns, slices=1):
        self.size = rows * columns
        places = [Place(i, (i // columns, i % columns, 0), slices * i // self.size) for i in range(self.size)]
        self.devices = np.array(places, object).reshape(rows, columns)


def test_links_of_a_torus():
    chip, sent = find_chip("TPU v5e"), Collective("all-gather", ("data",), 45e9, 1)
    # a line of four, a ring of 16, both dimensions of a torus
    assert collective_seconds(sent, chip, Grid(4, 4)) == pytest.approx(3 / 4)
    assert collective_seconds(sent, chip, Grid(16, 16)) == pytest.approx(15 / 16 / 2)
    both = Collective("all-reduce", ("data", "tensor"), 45e9, 1)
    assert collective_seconds(both, chip, Grid(16, 16)) == pytest.approx(2 * 255 / 256 / 4)
    moved = Collective("all-to-all", ("tensor",), 45e9, 1)
    assert collective_seconds(moved, chip, Grid(16, 16)) == pytest.approx(15 / 16 * 4 / 2)
    assert collective_seconds(sent, chip, Grid(1, 4)) == 0


def test_slices_use_the_slow_network():
    chip, summed = find_chip("TPU v5e"), Collective("all-reduce", ("data",), 3.125e9, 1)
    inside = collective_seconds(summed, chip, Grid(4, 4))
    # two slices of two rows: each device sends its half of the array
    crossing = collective_seconds(summed, chip, Grid(4, 4, slices=2))
    assert crossing == pytest.approx(2 * 3 / 4 * 3.125e9 / 45e9 + 2 / 2 / 2) and inside < crossing


def test_an_empty_roofline():
    assert np.isnan(Roofline({"compute": 0.0, "memory": 0.0}, 0.0, find_chip("H200")).mfu)
