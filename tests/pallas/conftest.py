"""Kernels in Pallas' TPU interpreter: compiled once, not once per simulated core, and with lean callbacks."""

import threading

import jax
import numpy as np
import pytest
from jax._src import callback as callbacks
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
def lean_callbacks(monkeypatch):
    """Callbacks receive NumPy arrays: the interpreter has one per load and store, most of it device_puts of scalars.

    A JAX built otherwise is left as it is. The interpreter of GPU kernels needs JAX arrays.
    """

    def call(*args, callback, **_):
        return [np.asarray(x) for x in callback(*args)]

    if hasattr(callbacks, "io_callback_impl"):
        monkeypatch.setattr(callbacks, "io_callback_impl", call)


@pytest.fixture
def interpreter(capfd, lean_callbacks):
    """Runs kernels in the interpreter; fails on a race, and clears the interpreter's state."""
    with interpreted():
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" not in capfd.readouterr().out
