"""Kernels in Pallas' TPU interpreter are compiled once, not once per simulated core."""

import threading

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from memformer.pallas.tpu.interpreter import interpreted

try:
    from jax._src.pallas.mosaic.interpret import thread_map
except ImportError:
    thread_map = None


@pytest.fixture(autouse=True)
def one_program_per_kernel(monkeypatch):
    """The cores that the interpreter simulates share one compiled program. A JAX built otherwise is left as it is."""
    lock, programs = threading.Lock(), {}

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in programs:
                call = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                programs[jaxpr] = call.trace(consts, *args).lower().compile()
        programs[jaxpr](consts, *args)

    if hasattr(thread_map, "_run_jaxpr"):
        monkeypatch.setattr(thread_map, "_run_jaxpr", run)


@pytest.fixture
def interpreter(capfd):
    """Runs kernels in the interpreter; fails on a race, and clears the interpreter's state."""
    with interpreted():
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" not in capfd.readouterr().out
