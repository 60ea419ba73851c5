"""Fewer programs: those of equal text are compiled once, runs share those of their first states, NumPy needs none."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import lax
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


def state_by_operation(model, tx, mesh, *, seed, ema=0.0):
    """The state that `init_state` returns, made operation by operation from the same random numbers.

    `init_state` is one program per run, as costly to compile as the step. Operations compile once per shape, for all
    runs of a process. What `init_state` promises is tested in test_step and test_sharding.
    """
    # imported on use: the tests of the core need no more than the core
    from memformer.training import step
    from memformer.training.sharding import state_shardings

    state = step._new_state(model, tx, ema, jax.random.key(seed))
    # copies: the step donates each array
    return jax.device_put(state, state_shardings(state, model.shardings(mesh), mesh), may_alias=False)


@contextlib.contextmanager
def states_by_operation() -> Iterator[None]:
    """Inside, the trainer makes the first state of a run by `state_by_operation`."""
    from memformer.training import loop

    with mock.patch.object(loop, "init_state", state_by_operation):
        yield


def lift_arrays() -> None:
    """Makes JAX arrays of NumPy arrays without compiling: JAX 0.10 has a program per shape and dtype, 14 ms each.

    jnp.asarray(x) stages a copy, jnp.asarray(x, dtype) converts what NumPy has converted before.
    """
    for primitive in (getattr(core, "stage_p", None), lax.convert_element_type_p):
        if primitive is not None:
            primitive.def_impl(functools.partial(_lift, primitive.impl))


def _lift(compiled: Callable[..., Any], x: Any, **options: Any) -> Any:
    same = isinstance(x, np.ndarray) and options.get("new_dtype", x.dtype) == x.dtype
    if same and not options.get("weak_type") and jax.sharding.get_abstract_mesh().empty:
        return jax.device_put(x.copy())
    return compiled(x, **options)
