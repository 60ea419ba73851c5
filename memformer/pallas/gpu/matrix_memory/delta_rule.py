"""The delta rule on Hopper: its equations are in scan.py and gradients.py.

Source: arXiv 2406.06484 (chunkwise delta rule), 2412.06464 (decay per head).
"""

from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.gpu.common import cut_call
from memformer.pallas.gpu.matrix_memory import entry as walk

__all__ = ["delta_rule", "run"]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    decay: Float[Array, "B T H"] | None,
    scale: float,
    index: Array | None,
    state: Float[Array, "B H K V"] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
    op: str = "delta_rule",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule by GPU kernels; arguments checked, q, k, v, beta and decay 0 at padding.

    Args:
      q: queries, bfloat16.
      k: keys, bfloat16.
      v: values, bfloat16.
      beta: strength of the write.
      decay: log decay per head, or None.
      scale: factor on the read.
      index: segment of every token (core.chunking.Segments), or None.
      state: initial state, or None for zeros.
      chunk_size: tokens a chunk; None takes the table's.
      precision: of the products.
      op: the caller's name, for messages.

    Returns:
      The output in bfloat16, and the state in float32.

    Raises:
      NotImplementedError: not an sm_90 GPU; inputs that are not bfloat16; a precision above bfloat16 products;
        decay per channel; keys wider than the kernels hold; a chunk size that no kernel has.
    """
    cut = cut_call(
        op,
        q,
        k,
        v,
        beta=beta,
        decay=decay,
        index=index,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
    )
    return walk.run(cut, q, k, v, beta, decay, index, state)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a call with one write per token."""
    return delta_rule(
        call.q,
        call.k,
        call.v,
        call.beta,
        decay=call.decay,
        scale=call.scale,
        index=None if call.segments is None else call.segments.index,
        state=call.state,
        chunk_size=call.chunk_size,
        precision=call.precision,
        op=call.op,
    )
