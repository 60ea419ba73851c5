"""The accelerator that a trace is for: what is chosen there, and what is loaded for it."""

import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from memformer.pallas import platform

TPU, HOPPER, AMPERE = (
    AbstractMesh((1,), ("one",), abstract_device=AbstractDevice(kind, 1, name))
    for kind, name in (("TPU v5", "tpu"), ("NVIDIA H200", "cuda"), ("NVIDIA A100", "cuda"))
)

# A process per chip, forked after the imports, runs every op with a kernel and lists the modules loaded.
LOADS = """
import os, sys
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import memformer as mf
assert not any(name.startswith("jax.experimental.pallas") for name in sys.modules), "import memformer loads Pallas"
wide, scalar = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 64, 2, 64), (1, 64, 2)))
calls = {
    mf.delta_rule: (wide, wide, wide, scalar),
    mf.linear_attention: (wide, wide, wide),
    mf.softmax_attention: (wide, wide, wide),
    mf.deltaformer: (wide, wide, wide),
}
for kind, name in (("TPU v5", "tpu"), ("NVIDIA H200", "cuda")):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    mesh = AbstractMesh((1,), ("one",), abstract_device=AbstractDevice(kind, 1, name))
    with jax.sharding.use_abstract_mesh(mesh):
        for op, arrays in calls.items():
            jax.eval_shape(lambda *x: op(*x, implementation="pallas")[0], *arrays)
    print(*sys.modules, flush=True)
    os._exit(0)
"""


def test_kernels_of_one_chip_load_nothing_of_the_other():
    run = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for loaded, chip, other in zip(run.stdout.splitlines(), ("tpu", "gpu"), ("gpu", "tpu"), strict=True):
        modules = loaded.split()
        assert f"memformer.pallas.{chip}.tuning" in modules
        assert not [module for module in modules if module.startswith(f"memformer.pallas.{other}")]


@pytest.mark.parametrize(
    ("mesh", "chip", "first"), [(TPU, "tpu", "pallas"), (HOPPER, "gpu", "cudnn"), (AMPERE, "gpu", "chunked")]
)
def test_choice_by_device(mesh, chip, first):
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform.chip() == chip
        assert platform.tpu_kind() == ("TPU v5" if chip == "tpu" else None)
        assert platform.is_hopper() == (mesh is HOPPER)
        assert platform.preferred(64, library="cudnn")[0] == first
        assert platform.preferred(4, library="cudnn") == ("recurrent", "chunked")


def test_an_interpreter_counts_as_its_chip():
    assert platform.chip() == "cpu"
    with platform.set_interpreter("gpu"):
        assert platform.chip() == "gpu" and platform.tpu_kind() is None
        with platform.set_interpreter("tpu"):
            assert platform.chip() == "tpu" and platform.tpu_kind() == "interpreter"
            # What the library chooses does not depend on the interpreter.
            assert platform.preferred(64) == ("chunked", "recurrent")
        assert platform.interpreting_for("gpu")
