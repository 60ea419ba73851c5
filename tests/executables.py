"""Compiled programs kept by their text: runs of one config trace the same programs anew, and compile them once."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jax._src import compiler

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
