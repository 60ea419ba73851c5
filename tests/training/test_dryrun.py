"""Dry runs: counts, advice for a run that does not fit, and requirements."""

import dataclasses
import importlib.util

import jax
import pytest

from memformer.training import dryrun
from memformer.training.build import build_run
from memformer.training.config import RunError
from memformer.training.dryrun import GIB, dry_run
from memformer.training.metrics import flops_per_token
from memformer.training.sharding import make_mesh, mesh_scope
from memformer.training.step import init_state
from tests.training.small import small_config


@pytest.fixture(scope="module")
def config():
    return small_config(model__depth=1, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def run(config):
    return build_run(config.to_dict())


@pytest.fixture(scope="module")
def found(config):
    return dry_run(config)


def test_counts(found, run, config):
    with mesh_scope(run.mesh):
        state = init_state(run.model, run.tx, run.mesh, seed=0)
    first = jax.devices()[0]
    held = [s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == first]
    assert found.state_bytes == sum(held)
    # a gradient of each parameter and a few activations at least, and no copy of everything on every device
    assert sum(x.nbytes for x in state["params"].values()) / 8 < found.working_bytes < 100 * sum(held)
    assert found.parameters == run.model.size() and found.devices == "8 x cpu"
    a_token = flops_per_token(config["model"], run.model.size(without=("embedding", "positions")), run.task.steps)
    assert found.flops == 8 * run.task.steps * a_token
    assert found.fits is None and "the memory of this device is not known" in str(found)


def test_verdict(found):
    need = found.state_bytes + found.working_bytes
    for limit, fits, words in ((need, True, "\nfits in"), (need - 1, False, "\ndoes not fit in")):
        known = dataclasses.replace(found, limit_bytes=limit)
        assert known.fits is fits and words in str(known)


@pytest.mark.parametrize(
    ("message", "used"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 120.00G of 16.00G hbm. Exceeded by", 120 * GIB),
        ("RESOURCE_EXHAUSTED: total memory for HLO temporaries (96.00G) exceeds available HBM (16.00G).", 100 * GIB),
    ],
)
def test_overflow_is_a_verdict(run, message, used):
    """Messages of libtpu 0.0.42, in place of the compiler."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    total, limit = dryrun._memory(Lowered(), "TPU v5 lite", 4 * GIB)
    assert (total, limit) == (used, 16 * GIB)
    advice = "\n".join(dryrun._advice(run, 4 * GIB, total - 4 * GIB, limit))
    assert "accumulate (now 1, 8 rows each)" in advice and "remat=full" in advice and "bfloat16" in advice
    assert "mesh.fsdp (now 2)" not in advice
    assert "mesh.fsdp (now 2)" in "\n".join(dryrun._advice(run, 12 * GIB, 8 * GIB, limit))


def test_other_errors_of_the_compiler_pass():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        dryrun._memory(Lowered(), "cpu", 0)


def test_what_it_needs(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"compiles with libtpu, which is not installed: pip install 'jax\[tpu\]=="):
        dry_run(config, "v5p:2x2x2")
    wrong = small_config(mesh__data=3)
    with pytest.raises(RunError, match="needs 3 devices, but 8 cpu devices were found"):
        dry_run(wrong)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpu_topology(config):
    found = dry_run(config, "v5e:4x2")
    assert found.fits and found.limit_bytes == 16 * GIB and found.devices == "8 x TPU v5 lite"
    with pytest.raises(RunError, match="--dryrun must be here or a TPU topology such as"):
        dry_run(config, "v99:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8, "tensor": 8}, {"data": 32, "tensor": 2}])
def test_axes_take_part_of_a_physical_axis(topology, sizes):
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes, dryrun.find_devices(topology))
    assert mesh.devices.size == 64 and len({device.id for device in mesh.devices.flat}) == 64
    assert {name: size for name, size in mesh.shape.items() if size > 1} == sizes
