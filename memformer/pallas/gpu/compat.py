"""Differences between the supported versions of JAX (0.10.2 to 0.12)."""

import contextlib
import inspect

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.pallas.platform import interpreting_for

__all__ = ["fence_global", "gpu_interpret_mode", "load", "transpose_ref"]


def gpu_interpret_mode() -> contextlib.AbstractContextManager:
    """A context in which Mosaic GPU kernels run in the interpreter, with race detection.

    Raises:
      NotImplementedError: before 0.11, whose interpreter lacks what the kernels use (layout_cast).
    """
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        raise NotImplementedError(f"GPU kernels can be interpreted from jax 0.11 on, this is jax {jax.__version__}")
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    return plgpu.force_gpu_interpret_mode(params)


def fence_global() -> None:
    """Orders finished copies to global memory, and stores there, before later copies (TMA) from it.

    Pallas has a fence for shared memory alone. Its interpreter needs none, and has no inline code.
    """
    if interpreting_for("gpu"):
        return

    @plgpu.inline_mgpu()
    def fence(_):
        from jax.experimental.mosaic.gpu.utils import nvvm

        nvvm.fence_proxy(nvvm.ProxyKind.async_global)

    fence()


def load(ref, layout, optimized: bool = True) -> jax.Array:
    """Loads a whole ref; `plgpu.load` needs an index in 0.10."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def transpose_ref(ref):
    """Transposes a ref of two axes: a function before 0.11, a method since."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))
