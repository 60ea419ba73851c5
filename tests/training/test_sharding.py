"""The mesh, the rules, and sharded runs against one device: same losses, no large all-gather."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memformer.training import build, sharding
from memformer.training.build import build_run
from memformer.training.config import RunError, default_config
from memformer.training.dryrun import CPU_OPTIONS, lower_step
from memformer.training.input import make_loader
from memformer.training.program import read_program
from memformer.training.sharding import (
    AXES,
    RULES,
    count_slices,
    global_batch,
    make_mesh,
    mesh_scope,
    partition_spec,
)
from memformer.training.step import init_state, make_train_step
from tests.executables import state_by_operation
from tests.programs import collectives_in_loops
from tests.training import process_steps
from tests.training.small import small_config

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
ROWS = 512
CUBE = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
IMPOSSIBLE = [
    ({**ONE, "data": 3}, r"data=3, .*needs 3 devices, but 8 cpu devices were found"),
    ({**ONE, "data": -1, "tensor": 3}, "needs a multiple of 3 devices, but 8 cpu devices"),
    ({**ONE, "data": -1, "fsdp": -1}, "at most one -1"),
    ({**ONE, "data": 0}, "at least 1"),
    ({"data": 8}, "must have the axes data, fsdp, context, tensor, got data"),
    (
        {**ONE, "data": 8, "slices": 3},
        r"slices must be 0 \(.*\) or a divisor of the 8 devices, got 3",
    ),
    ({**ONE, "data": 8, "slices": -1}, "slices must be 0"),
    ({**ONE, "data": 2, "fsdp": 4, "slices": 4}, "data must be a multiple of the 4 slices, .* got data=2, fsdp=4"),
]


@pytest.mark.parametrize(("sizes", "says"), IMPOSSIBLE, ids=[str(i) for i in range(len(IMPOSSIBLE))])
def test_impossible_mesh(sizes, says):
    with pytest.raises(RunError, match=says):
        make_mesh(sizes)


def test_free_axis_takes_the_rest():
    assert dict(make_mesh({**ONE, "fsdp": -1, "tensor": 2}).shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


def test_slices_are_the_outer_part_of_data():
    """Only the data axis spans slices; inside each, the mesh is that of one slice alone."""
    sizes = {**ONE, "data": 4, "tensor": 2}
    devices = jax.devices()
    mesh = make_mesh({**sizes, "slices": 2}, devices[::-1])
    for i, part in enumerate((devices[7:3:-1], devices[3::-1])):
        inside = make_mesh({**sizes, "data": 2}, part)
        assert mesh.devices[2 * i : 2 * i + 2].tolist() == inside.devices.tolist()
    assert mesh.axis_names == AXES and dict(mesh.shape) == sizes
    assert make_mesh({**sizes, "slices": 0}) == make_mesh({**sizes, "slices": 1}) == make_mesh(sizes)


class Chip:
    """A TPU of one of several slices."""

    platform, device_kind, process_index = "tpu", "TPU v4", 0

    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.coords, self.core_on_chip = index, slice_index, (index % 4, 0, 0), 0


def test_reported_slices():
    chips = [Chip(i, slice_index) for slice_index in (1, 0) for i in range(4)]
    assert count_slices(chips) == 2 and count_slices() == 1
    mesh = make_mesh({**ONE, "data": 2, "fsdp": 4}, chips)
    assert [[chip.slice_index for chip in row.flat] for row in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(RunError, match="slices must be 0 or 2, the slices of these TPUs, .* got 1 and slices of 4, 4"):
        make_mesh({**ONE, "data": 2, "fsdp": 4, "slices": 1}, chips)
    with pytest.raises(RunError, match="data must be a multiple of the 2 slices"):
        make_mesh({**ONE, "fsdp": 8}, chips)
    with pytest.raises(RunError, match="slices of 3, 4 devices"):
        make_mesh({**ONE, "data": 7}, chips[:7])


def test_two_axes_of_one_parameter_that_ask_for_one_mesh_axis():
    config = small_config(model__feedforward="moe")
    config.mesh.update({"data": 4, "expert": 2})
    run = build_run(config.to_dict())
    assert run.model.shardings(run.mesh)["blocks.0.feedforward.gate"].spec == PartitionSpec("expert", "fsdp", "tensor")
    # two of eight experts multiply a token; the router multiplies each
    experts = sum(x.size for name, x in run.model.params.items() if name.endswith(("gate", "up", "down")))
    assert run.model.matrix_size() == run.model.size() - experts * 6 // 8


def test_specs():
    mesh = make_mesh(CUBE)
    cases = [
        (("embed", "heads"), (8, 8), PartitionSpec("fsdp", "tensor")),
        (("layers", "embed", "mlp"), (3, 8, 8), PartitionSpec(None, "fsdp", "tensor")),
        # not divisible: whole
        (("vocab", "embed"), (15, 8), PartitionSpec(None, "fsdp")),
        # a mesh axis serves once
        (("mlp", "heads"), (8, 8), PartitionSpec("tensor", None)),
        (("experts", "embed", "mlp"), (2, 8, 8), PartitionSpec(None, "fsdp", "tensor")),
        (("activation_batch", "activation_time"), (8, 5), PartitionSpec(("data", "fsdp"), "context")),
        (None, (3,), PartitionSpec()),
    ]
    for names, shape, want in cases:
        assert partition_spec(names, shape, mesh) == want, names
    mesh = make_mesh({**CUBE, "data": 1, "expert": 2})
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert partition_spec(("experts", "embed", "mlp"), (2, 8, 8), mesh) == PartitionSpec("expert", "fsdp", "tensor")
    # what is no expert lies over the axis of experts too, as far as it divides
    assert partition_spec(("embed",), (8,), mesh) == PartitionSpec(("fsdp", "expert"))
    assert partition_spec(("embed",), (6,), mesh) == PartitionSpec("fsdp")
    with pytest.raises(ValueError, match="has no rule"):
        partition_spec(("width",), (8,), mesh)
    with pytest.raises(ValueError, match="as many as"):
        partition_spec(("embed",), (8, 8), mesh)


@pytest.mark.parametrize("model", [{"memory": "softmax_attention, lstm"}, {"type": "ntm"}])
def test_what_cannot_divide_time(model):
    config = default_config(model.get("type", "memory_lm"))
    config.model.update(model)
    config.mesh.update({"data": 2, "context": 4})
    name = model.get("type", "lstm")
    with pytest.raises(RunError, match=rf"mesh.context = 4 divides time over devices, which {name} cannot"):
        build_run(config.to_dict())


def test_batch_must_divide():
    run = build_run(small_config(mesh__data=8).to_dict())
    batch = next(make_loader(run.task, "train", batch_size=6, seed=0))
    with pytest.raises(RunError, match="multiple of mesh data x fsdp = 8 x 1, got 6"):
        global_batch(batch, run.mesh)


def prepared(memory, mesh):
    """A small run on the devices of a mesh: its parts, compiled step, state and batches."""
    sizes = {"model__width": 32, "model__heads": 4, "model__depth": 1, "model__feedforward": None}
    # without the start, time divides by four
    config = small_config(memory, **sizes, task__start="none", optimizer__learning_rate=1e-3)
    config.mesh = mesh
    config = config.to_dict()
    run = build_run(config, devices=jax.devices()[: math.prod(mesh.values())])
    # so large a batch that any activation of it is larger than every weight
    loader = make_loader(run.task, "train", batch_size=ROWS, seed=0)
    with mesh_scope(run.mesh):
        batches = [global_batch(next(loader), run.mesh) for _ in range(3)]
        # on the cube the program of `init_state` lays out its values; elsewhere they are made by operation
        make_state = init_state if dict(run.mesh.shape) == CUBE else state_by_operation
        state = make_state(run.model, run.tx, run.mesh, seed=0)
        step = make_train_step(run.model, run.tx, run.schedule, run.mesh, config["train"])
        compiled = step.lower(state, batches[0]).compile()
    return run, compiled, state, batches


def losses(run, step, state, batches):
    found = []
    for batch in batches:
        before = float(state["sums"]["loss"]) * (int(state["step"]) % 2)
        state, report = step(state, batch)
        found.append((float(report["loss"]) - before) / (ROWS * run.task.length))
    return found


@functools.cache
def on_one_device(memory):
    """Losses of a run on one device, and its compiled step."""
    one = prepared(memory, ONE)
    return losses(*one), one[1].as_text()


def test_eight_devices_do_what_one_does():
    """A model with a matrix memory; tests/models/test_sharding.py lays one of each family on a mesh."""
    memory = "linear_attention"
    many = prepared(memory, CUBE)
    run, step, state, _ = many
    name, kernel = next(item for item in state["params"].items() if item[0].endswith("projections.query.kernel"))
    assert kernel.sharding == NamedSharding(run.mesh, PartitionSpec("fsdp", "tensor"))
    leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    moments = [x for path, x in leaves if getattr(path[-1], "key", None) == name]
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    largest = max(math.prod(x.shape) for x in run.model.params.values())
    gathered = gathered_sizes(step.as_text())
    assert gathered, "parameters split over fsdp must be gathered somewhere"
    # tensor gathers the tokens of its devices before each layer, and nobody else does
    largest = max(largest, ROWS // 4 * run.task.steps * 32)
    assert max(gathered) <= largest, f"gathered {max(gathered)} elements; the largest weight has {largest}"
    np.testing.assert_allclose(losses(*many), on_one_device(memory)[0], rtol=1e-5)


def test_time_over_devices_does_what_one_does():
    """Losses are those of one device, work is divided, and no collective runs inside a loop over time."""
    many, (want, alone) = prepared("linear_attention", {**ONE, "context": 4}), on_one_device("linear_attention")
    text = many[1].as_text()
    assert not collectives_in_loops(text)
    cost, whole = (read_program(run, many[0].mesh).flops for run in (text, alone))
    # what combines the states of the devices is a larger part of a layer without a feedforward network
    assert cost <= 1.3 * whole / 4
    batch = many[3][0]
    assert batch["inputs"].sharding.spec == PartitionSpec(("data", "fsdp"), "context")
    np.testing.assert_allclose(losses(*many), want, rtol=1e-5)


def test_tokens_between_layers_lie_over_tensor(monkeypatch):
    """With a tensor axis a device keeps its part of the tokens between layers; sent is what the layers need."""
    sizes = {"model__width": 32, "model__heads": 4, "model__depth": 3, "model__scan_layers": True}
    config = small_config(**sizes, task__start="none", train__batch_size=ROWS)
    config.mesh.update({"data": 2, "tensor": 4})
    run, found = build_run(config.to_dict()), {}
    for name, rule in {"whole": "context", "parts": ("context", "tensor")}.items():
        rules = {**dict(RULES), "activation_norm_time": rule}
        monkeypatch.setattr(sharding, "RULES", tuple(rules.items()))
        with mesh_scope(run.mesh):
            found[name] = lower_step(run)[0].compile(compiler_options=CPU_OPTIONS)
    whole, parts = (found[name].as_text() for name in ("whole", "parts"))
    rows, steps = ROWS // 2, run.task.steps
    # what the scan over layers saves
    assert f"f32[3,{rows},{steps},32]" in whole
    assert f"f32[3,{rows},{steps // 4},32]" in parts and f"f32[3,{rows},{steps},32]" not in parts
    needs = [found[name].memory_analysis().temp_size_in_bytes for name in ("whole", "parts")]
    assert needs[1] < 0.8 * needs[0]
    sent = [c.bytes for c in read_program(parts, run.mesh).collectives if c.kind == "all-gather" and "tensor" in c.axes]
    # the input of each half of a layer twice, the gradient of its output once, and the input of the logits
    assert sum(sent) <= 1.1 * (3 * 2 * 3 + 2) * rows * steps * 32 * 4


def test_explicit_axes_do_what_one_device_does(monkeypatch):
    """A run on a mesh with Explicit axes, as `jax.make_mesh` makes them, trains to the losses of one device, which runs
    with Auto axes have above."""

    def explicit(sizes, devices=None):
        return Mesh(make_mesh(sizes, devices).devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))

    with monkeypatch.context() as patch:
        patch.setattr(process_steps, "init_state", state_by_operation)
        want = process_steps.losses({"data": 1}, jax.devices()[:1])
    monkeypatch.setattr(build, "make_mesh", explicit)
    np.testing.assert_allclose(process_steps.losses({"data": 2, "tensor": 2}, jax.devices()[:4]), want, rtol=1e-5)


def gathered_sizes(text):
    """Elements of each all-gather's result in a compiled program."""
    results = re.findall(r" = (.*?) all-gather(?:-start)?\(", text)
    shapes = [shape for result in results for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def test_every_rule_names_axes_of_the_mesh():
    for _, axes in RULES:
        assert set([axes] if isinstance(axes, str) else axes or ()) <= {*ONE, "expert"}
