"""Fewer programs: those of equal text are compiled once, and NumPy arrays become JAX arrays without one."""

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
