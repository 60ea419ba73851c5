"""The Pallas kernels of the matrix memories, with the chunked form's gradient where a chip has no backward kernel."""

import dataclasses

import jax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory import chunked
from memformer.pallas import matrix_memory as pallas
from memformer.pallas.platform import chip

__all__ = ["run"]

ARRAYS = ("q", "k", "v", "w", "alpha", "beta", "decay", "segments", "state")


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the kernels of the chip.

    On a GPU those for a decay per channel, w or alpha are forward kernels: the gradient runs the chunked form on the
    same inputs.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip; the message names the implementation that does.
    """
    if chip() != "gpu" or not (call.decay_per_channel or call.w is not None or call.alpha is not None):
        return pallas.run(call)

    def by(implementation):
        return lambda arrays: implementation(dataclasses.replace(call, **arrays))

    def forward(arrays):
        return kernel(arrays), arrays

    def backward(arrays, cotangents):
        outputs, pullback = jax.vjp(by(chunked.run), arrays)
        return pullback(tuple(dx.astype(x.dtype) for dx, x in zip(cotangents, outputs, strict=True)))

    kernel = jax.custom_vjp(by(pallas.run))
    kernel.defvjp(forward, backward)
    return kernel({name: getattr(call, name) for name in ARRAYS})
