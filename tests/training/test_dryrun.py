"""Dry runs: counts, advice for a run that does not fit, and requirements."""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest

from memformer.pallas import platform
from memformer.training import dryrun, plan
from memformer.training.build import build_run
from memformer.training.chips import GIB, find_chip
from memformer.training.config import RunError
from memformer.training.dryrun import DryRun, Feeding, describe_feeding, dry_run, lower_step
from memformer.training.metrics import flops_per_token
from memformer.training.roofline import Roofline
from memformer.training.sharding import make_mesh, mesh_scope
from memformer.training.step import abstract_state
from memformer.training.topology import find_devices, topology_name
from tests.training.small import small_config


@pytest.fixture(scope="module")
def config():
    return small_config(model__depth=1, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def run(config):
    return build_run(config.to_dict())


@pytest.fixture(scope="module")
def found(config):
    return dry_run(config, "h200:8")


def test_counts(found, run, config):
    # test_sharding compares the arrays of a run with these shardings
    with mesh_scope(run.mesh):
        state = abstract_state(run.model, run.tx, run.mesh)
    held = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)]
    assert found.state_bytes == sum(held)
    # a gradient of each parameter and a few activations at least, and no copy of everything on every device
    assert sum(x.size * x.dtype.itemsize for x in state["params"].values()) / 8 < found.working_bytes < 100 * sum(held)
    assert found.parameters == run.model.size() and found.devices == "8 x H200" and found.estimate
    a_token = flops_per_token(config["model"], run.model.size(without=("embedding", "positions")), run.task.steps)
    assert found.flops == 8 * run.task.steps * a_token
    assert found.fits and found.limit_bytes == 141 * 10**9


def test_bytes_by_kind(run):
    """Weights in float32 and two moments: twelve bytes per parameter over the devices that share them."""
    with mesh_scope(run.mesh):
        lowered, held = lower_step(run)
        need = lowered.compile().memory_analysis()
    shardings = run.model.shardings(run.mesh)
    sizes = {name: math.prod(shardings[name].shard_shape(x.shape)) for name, x in run.model.params.items()}
    assert held["weights"] == 4 * sum(sizes.values())
    # moments, the step, the key, the sums since the last log
    assert 0 < held["optimizer"] - 2 * held["weights"] < 200
    assert need.argument_size_in_bytes == pytest.approx(sum(held.values()), abs=200)
    assert held["batch"] == 8 / 4 * run.task.steps * 5 * 4


def test_bytes_when_all_is_shared():
    """With fsdp dividing every matrix, a device holds its share of 12 bytes per parameter."""
    config = small_config(model__depth=1, mesh__fsdp=8, model__width=64)
    run = build_run(config.to_dict())
    with mesh_scope(run.mesh):
        _, held = lower_step(run)
    state = held["weights"] + held["optimizer"]
    assert state == pytest.approx(12 * run.model.size() / 8, rel=0.05)


def test_the_report(found):
    text = str(found)
    for words in ("weights", "optimizer", "batch", "temporaries", "compiled for CPUs", "largest term", "MFU at most"):
        assert words in text
    assert re.search(r"(all-gather|reduce-scatter|all-reduce) over fsdp +\d", text)
    assert re.search("a host needs [\\d,]+ tokens/s; one thread of this machine makes [\\d,]+", text)


def test_sentences_about_the_input():
    few, many = Feeding(rows=8, made=30.0, steps=512), Feeding(rows=8, made=0.1, steps=512)
    assert describe_feeding(few, 0.1).endswith("makes 15,360: too few; set --config.train.input_workers=3")
    assert describe_feeding(many, 0.1).endswith("too few by a factor of 800: the input bounds the step")
    assert "the data are not here" in describe_feeding(Feeding(rows=8, made=None, steps=512), 0.1)


def test_an_unknown_device(config, found):
    unknown = dataclasses.replace(found, limit_bytes=None, roofline=None, feeding=None)
    assert unknown.fits is None and "the memory of this device is not known" in str(unknown)


def test_roofline_of_one_layer():
    """The computed FLOPs of a layer whose products are wide are those of a hand count."""
    sizes = {"model__width": 128, "model__heads": 1, "task__length": 64, "task__start": "none"}
    config = small_config(model__depth=1, mesh__fsdp=8, **sizes)
    found, run = dry_run(config, "h200:8"), build_run(config.to_dict())
    width, tokens, classes = 128, 8 * 64, run.task.num_classes
    hidden = run.model.params["blocks.0.feedforward.gate.kernel"].shape[-1]
    # the products of the block and the logits; forward and twice that backward
    products = 3 * 2 * tokens * (matrices(run) + width * classes)
    assert matrices(run) == pytest.approx(4 * width**2 + 3 * width * hidden, rel=0.1)
    # scores and their product with the values in a chunk of 64, reads and writes of a 128 x 128 state
    memory = 3 * tokens * (2 * 64 * 2 * width + 2 * 2 * width * width)
    assert found.roofline.terms["compute"] * 989e12 * 8 == pytest.approx(products + memory, rel=0.1)


def matrices(run) -> int:
    """Parameters of the products inside the block."""
    return sum(x.size for name, x in run.model.params.items() if name.startswith("blocks") and len(x.shape) == 2)


def test_verdict(found):
    need = found.state_bytes + found.working_bytes
    for limit, fits, words in ((need, True, "\nfits in"), (need - 1, False, "\ndoes not fit in")):
        known = dataclasses.replace(found, limit_bytes=limit)
        assert known.fits is fits and words in str(known)


@pytest.mark.parametrize(
    ("message", "used"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 120.00G of 16.00G hbm. Exceeded by", 120 * GIB),
        ("RESOURCE_EXHAUSTED: total memory for HLO temporaries (96.00G) exceeds available HBM (16.00G).", 96 * GIB),
    ],
)
def test_overflow_is_a_verdict(run, message, used):
    """Messages of libtpu 0.0.42, in place of the compiler."""

    class Lowered:
        def compile(self, **_):
            raise jax.errors.JaxRuntimeError(message)

    needed, program, limit = dryrun._compile(Lowered(), run, {"weights": 2 * GIB, "optimizer": 2 * GIB, "batch": 0})
    assert (sum(needed.values()), limit, program) == (used, 16 * GIB, None)


def test_other_errors_of_the_compiler_pass(run):
    class Lowered:
        def compile(self, **_):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        dryrun._compile(Lowered(), run, {"weights": 0})


def test_what_it_needs(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"compiles with libtpu, which is not installed: pip install 'jax\[tpu\]=="):
        dry_run(config, "v5p:2x2x2")
    wrong = small_config(mesh__data=3)
    with pytest.raises(RunError, match="needs 3 devices, but 8 cpu devices were found"):
        dry_run(wrong)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpu_topology(config):
    found = dry_run(config, "v5e-8")
    assert found.fits and found.limit_bytes == 16 * GIB and found.devices == "8 x TPU v5 lite"
    assert found.roofline.chip.name == "TPU v5 lite" and not found.estimate
    # without scheduling the instructions: the same figures but for the code
    quick = dry_run(config, "v5e-8", full=False)
    assert quick.partial and "--dryrun_full" in str(quick)
    assert quick.collectives == found.collectives and quick.roofline.terms == pytest.approx(found.roofline.terms)
    code = found.bytes["temporaries"] - quick.bytes["temporaries"]
    assert 0 < code < 64 * 2**20 and {**quick.bytes, "temporaries": 0} == {**found.bytes, "temporaries": 0}
    with pytest.raises(RunError, match="--dryrun must be here, a TPU type or topology such as"):
        dry_run(config, "v99:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_gradients_are_reduce_scattered(monkeypatch):
    """With fsdp every device receives its part of the sum of each gradient, and no more."""
    # kernels take long to compile and exchange nothing
    monkeypatch.setattr(platform, "_backend", lambda: "cpu")
    sizes = {"model__width": 128, "model__depth": 2, "model__scan_layers": True, "mesh__fsdp": 8}
    config = small_config(**sizes)
    found, run = dry_run(config, "v5e:2x4"), build_run(config.to_dict())
    moved = {c.kind: c.bytes for c in found.collectives if c.axes == ("fsdp",)}
    matrices = sum(4 * math.prod(x.shape) for x in run.model.params.values() if math.prod(x.shape[-2:]) >= 128 * 128)
    assert moved["reduce-scatter"] == pytest.approx(matrices, rel=0.2)
    assert moved["all-reduce"] < 0.1 * matrices


# shares of the devices by axis: the usual meshes of a pod
SHARES = [
    {"data": 1},
    {"fsdp": 1},
    {"fsdp": 1, "tensor": 4},
    {"data": 4, "fsdp": 1, "tensor": 4},
    {"fsdp": 1, "tensor": 8},
    {"data": 1, "tensor": 2},
    {"fsdp": 1, "context": 4},
    {"data": 2, "fsdp": 1, "context": 2, "tensor": 2},
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:4x4", "v6e:8x8"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_usual_meshes_are_built(topology, shares):
    """An axis may take part of a physical axis of the torus; the axis of share 1 takes the rest."""
    devices = find_devices(topology)
    largest = next(name for name, share in shares.items() if share == 1)
    sizes = {**shares, largest: len(devices) // math.prod(shares.values())}
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes, devices)
    assert len({device.id for device in mesh.devices.flat}) == len(devices)
    assert {name: mesh.shape[name] for name in sizes} == sizes


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_topology_of_two_slices():
    devices = find_devices("v5e:4x4", 2)
    mesh = make_mesh({"data": 4, "fsdp": 8, "context": 1, "tensor": 1}, devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    ("where", "topology"),
    [
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-256", "v5p:4x4x8"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-1", "v6e:1x1"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("v6e:8x8", "v6e:8x8"),
    ],
)
def test_accelerator_types(where, topology):
    assert topology_name(where) == topology


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("v5p-100", "v5p-100: the number must be a power of two"),
        ("h200", "h200 needs the number of GPUs of one box"),
        ("h200:16", "needs the number of GPUs of one box"),
        ("elsewhere", "--dryrun must be here, a TPU type or topology"),
    ],
)
def test_devices_that_are_unknown(where, says):
    with pytest.raises(RunError, match=says):
        find_devices(where)


def needs(config):
    """A dry run without a compiler: 12 GiB of state over fsdp, 8 GiB of activations per row that a remat reduces."""
    train, mesh, model = config["train"], config["mesh"], config["model"]
    rows = train["batch_size"] / (train["accumulate"] * mesh["data"] * mesh["fsdp"])
    kept = {None: 1.0, "projections": 0.5, "full": 0.25}[model["remat"]]
    sizes = {"weights": 4 * GIB, "optimizer": 8 * GIB, "batch": 0}
    sizes = {name: int(size / mesh["fsdp"]) for name, size in sizes.items()}
    sizes["temporaries"] = int(8 * GIB * rows * kept / mesh["tensor"])
    # recomputation takes time, and a tensor axis more
    seconds = rows * (1 + {None: 0, "projections": 0.1, "full": 0.3}[model["remat"]]) * mesh["tensor"] ** 0.1
    bound = Roofline({"compute": seconds, "memory": 0.1}, rows * 1e12, find_chip("TPU v5e"))
    return DryRun("8 x TPU v5e", 10**9, sizes, 16 * GIB, 1.0, 0.0, bound, feeding=Feeding(1, None, 512))


@pytest.fixture
def counted(monkeypatch):
    tried = []

    def count(config, where, full):
        assert not full
        tried.append(config)
        return needs(config)

    monkeypatch.setattr(plan, "dry_run", count)
    return tried


def test_changes_are_tried_in_order(counted):
    config = small_config(model__depth=2, mesh__data=8, train__batch_size=64).to_dict()
    lines = list(plan.make_fit(config, "v5e-8", needs(config)))
    assert lines[0] == "tried --config.mesh.data=1 --config.mesh.fsdp=8: 65.50 GiB of 16.00 GiB"
    assert "remat=projections: 33.50 GiB" in lines[1] and "remat=full: 17.50 GiB" in lines[2]
    # float32 to bfloat16 changes nothing here; two micro-batches do
    assert "dtype=bfloat16: 17.50" in lines[3] and "accumulate=2: 9.50" in lines[4]
    assert lines[5].startswith("fits with --config.mesh.data=1 --config.mesh.fsdp=8 --config.model.remat=full")
    assert len(counted) == 5 and len(lines) == 6 and config["mesh"]["data"] == 8


def test_nothing_makes_it_fit(counted):
    config = small_config(model__depth=2, mesh__fsdp=8, model__remat="full", model__dtype="bfloat16").to_dict()
    config["train"]["batch_size"] = 8
    big = {**needs(config).bytes, "weights": 64 * GIB}
    found = dataclasses.replace(needs(config), bytes=big)
    assert list(plan.make_fit({**config, "model": {**config["model"], "heads": 1}}, "v5e-8", found)) == [
        "no change here makes it fit: use more devices, or a smaller model or train.batch_size"
    ]


def test_search(counted, capsys):
    config = small_config(model__depth=2).to_dict()
    found = plan.search_runs(config, "h200:8", tries=20)
    assert all(choice.found.fits for choice in found) and len(counted) <= 20
    assert [choice.tokens for choice in found] == sorted((choice.tokens for choice in found), reverse=True)
    assert {choice.changes["mesh.tensor"] for choice in found} == {1, 2}
    plan.show_search(config, "h200:8")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-4].startswith("the three best") and "--config.mesh.fsdp=8" in shown[-3]
