"""The accelerator that a trace is for, and the order in which implementations are tried there.

This module loads no kernel and no part of Pallas, so that asking costs nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

from memformer.core.symbolic import is_symbolic

__all__ = ["Chip", "chip", "interpreting_for", "is_hopper", "preferred", "set_interpreter", "tpu_kind"]

Chip = Literal["tpu", "gpu"]

_interpreter: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("memformer_interpreter", default=None)

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@contextlib.contextmanager
def set_interpreter(kind: Chip) -> Iterator[None]:
    """Declares that kernels traced inside run in Pallas' interpreter of a TPU or of a GPU.

    The packages `tpu` and `gpu` enter this together with Pallas' own switch, see their `interpreted`.
    """
    token = _interpreter.set(kind)
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpreting_for(kind: Chip) -> bool:
    """Whether kernels traced now run in the interpreter of this kind of chip."""
    return _interpreter.get() == kind


def chip() -> str:
    """Kind of chip that this trace is for: "tpu", "gpu" or "cpu".

    An interpreter counts as its chip. Ahead-of-time compilation takes the device of the mesh set by
    jax.sharding.use_abstract_mesh. Otherwise it is JAX's default backend.
    """
    interpreter = _interpreter.get()
    return _backend() if interpreter is None else interpreter


def _backend() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform == "cuda" else platform


def tpu_kind() -> str | None:
    """Kind of TPU that this trace is for, "interpreter", or None where it is for no TPU."""
    if interpreting_for("tpu"):
        return "interpreter"
    if _backend() != "tpu":
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def is_hopper() -> bool:
    """Whether this trace is for an sm_90 GPU."""
    if _backend() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return any(name in device.device_kind for name in HOPPER)
    return jax.devices()[0].compute_capability == "9.0"


def preferred(tokens: int, few: int = 4, library: str | None = None, decodes: bool = False) -> tuple[str, ...]:
    """Implementations in the order in which `implementation=None` tries them.

    Kernels come first on a TPU and on an sm_90 GPU if there is one device or a mesh is set (jax.set_mesh): the
    compiler cannot partition a kernel by itself. For a few tokens the recurrence comes before all but kernels for
    decoding.

    Args:
      tokens: T of the call.
      few: largest T for which the recurrence comes first.
      library: implementation by another library that comes before our kernels on an sm_90 GPU.
      decodes: whether the op has kernels for a few tokens.
    """
    if is_symbolic(tokens):
        return ("chunked", "recurrent")
    kernels: tuple[str, ...] = ()
    if jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty:
        if _backend() == "tpu":
            kernels = ("pallas",)
        elif is_hopper():
            kernels = ("pallas",) if library is None else (library, "pallas")
    if tokens <= few:
        return (*(kernels[-1:] if decodes else ()), "recurrent", "chunked")
    return (*kernels, "chunked", "recurrent")
