"""The kernels of the matrix memories: those of a few tokens for decoding, those of chunks for more.

A kernel for a few tokens has no derivative of its own: whatever is differentiated runs as the recurrence, which has
every derivative and takes as long.
"""

import dataclasses
from typing import Any

import jax

from memformer.core.calls import MatrixCall
from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory import recurrent
from memformer.pallas import matrix_memory as pallas
from memformer.pallas.decoding import MOST_TOKENS

__all__ = ["complete", "run"]


def complete(call: MatrixCall) -> tuple[str, ...]:
    """Implementations that have every derivative of a call, see `dispatch`."""
    length = call.q.shape[1]
    few = not is_symbolic(length) and length <= MOST_TOKENS
    return ("recurrent", "pallas") if few else ("recurrent",)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Array]:
    """Runs a matrix memory by a kernel.

    Returns:
      The output in float32 (in bfloat16 from the kernels of chunks where q, k and v are), and the state.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip; the message names the implementation that does.
    """
    if call.q.shape[1] > MOST_TOKENS:
        return pallas.run(call)
    arrays = {name: x for name, x in vars(call).items() if isinstance(x, jax.Array)} | {"segments": call.segments}
    fixed: Any = dataclasses.replace(call, **dict.fromkeys(arrays))

    @jax.custom_jvp
    def decode(arrays):
        return pallas.decode(dataclasses.replace(fixed, **arrays))

    @decode.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda arrays: recurrent.run(dataclasses.replace(fixed, **arrays)), primals, tangents)

    return decode(arrays)
