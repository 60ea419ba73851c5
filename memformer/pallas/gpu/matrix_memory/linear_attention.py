"""Linear attention on Hopper: its equations are in scan.py and gradients.py.

Source: arXiv 2312.06635 (chunkwise form), 2405.21060 (decay per head).
"""

from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.gpu.common import cut_call
from memformer.pallas.gpu.matrix_memory import entry as walk

__all__ = ["linear_attention", "run"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    decay: Float[Array, "B T H"] | None,
    scale: float,
    index: Array | None,
    state: Float[Array, "B H K V"] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention by GPU kernels; arguments checked, q, k, v and decay 0 at padding.

    Args:
      q: queries, bfloat16.
      k: keys, bfloat16.
      v: values, bfloat16.
      decay: log decay per head, or None.
      scale: factor on the read.
      index: segment of every token (core.chunking.Segments), or None.
      state: initial state, or None for zeros.
      chunk_size: tokens a chunk; None takes the table's.
      precision: of the products.

    Returns:
      The output in bfloat16, and the state in float32.

    Raises:
      NotImplementedError: not an sm_90 GPU; inputs that are not bfloat16; a precision above bfloat16 products;
        decay per channel; keys wider than the kernels hold; a chunk size that no kernel has.
    """
    cut = cut_call(
        "linear_attention",
        q,
        k,
        v,
        beta=None,
        decay=decay,
        index=index,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
    )
    return walk.run(cut, q, k, v, None, decay, index, state)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a call with one write per token."""
    return linear_attention(
        call.q,
        call.k,
        call.v,
        decay=call.decay,
        scale=call.scale,
        index=None if call.segments is None else call.segments.index,
        state=call.state,
        chunk_size=call.chunk_size,
        precision=call.precision,
    )
