"""Fewer programs: those of equal text are compiled once, and NumPy arrays become JAX arrays without one."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import compiler, core

KEPT: dict[tuple, Any] = {}


@contextlib.contextmanager
def kept_executables() -> Iterator[None]:
    """Inside, a program whose text, devices and options were compiled before is not compiled again.

    Names and source lines are no part of the text, so tests that read them from a compiled program stay outside. A
    program with host callbacks holds addresses and is always compiled.
    """
    compile_program = compiler.backend_compile_and_load

    def look_up(backend, module, devices, options, host_callbacks):
        key = (id(backend), str(module), tuple(d.id for d in devices), options.SerializeAsString())
        if host_callbacks or key not in KEPT:
            made = compile_program(backend, module, devices, options, host_callbacks)
            return made if host_callbacks else KEPT.setdefault(key, made)
        return KEPT[key]

    with mock.patch.object(compiler, "backend_compile_and_load", look_up):
        yield


def lift_arrays() -> None:
    """jnp.asarray of a NumPy array copies it: JAX 0.10 compiles a program per shape and dtype for that, 14 ms each."""
    stage = getattr(core, "stage_p", None)
    if stage is None:
        return
    compiled = stage.impl

    def lift(x):
        if isinstance(x, np.ndarray) and jax.sharding.get_abstract_mesh().empty:
            return jax.device_put(x, may_alias=False)
        return compiled(x)

    stage.def_impl(lift)
