"""Linear attention: a matrix memory that adds each value at its key."""

import jax
import jax.numpy as jnp

from memformer.core.checks import check_flags
from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings
from memformer.core.types import Array, Float, Int
from memformer.ops.matrix_memory import chunked, context, decoding, recurrent
from memformer.ops.matrix_memory.arguments import make_call
from memformer.pallas.platform import preferred

__all__ = ["linear_attention"]

IMPLEMENTATIONS = {"recurrent": recurrent.run, "chunked": chunked.run, "pallas": decoding.run}


@keep_shardings
def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    normalize: bool = False,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | Float[Array, "B P H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | Float[Array, "B P H K V"]]:
    """Adds each value to the memory at its key, and reads at the query.

        S_t = exp(decay_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t

    With normalize, z_t = exp(decay_t) z_{t-1} + k_t and o_t = S_t^T q_t / (z_t . q_t) (scale cancels); queries and
    keys must then be positive (a feature map), or the denominator may vanish.
    A constant decay per head is RetNet, a decay per head and token Mamba-2 (SSD), a decay per key channel GLA.

    Args:
      q: queries. G may be less than the number of value heads H; query and key head g then serves the H / G value
        heads from g H / G on.
      k: keys.
      v: values.
      decay: log decay (at most 0) of the state before each token, per head or per head and key channel; None is 0.
      normalize: whether to divide by the sum of the weights; z is then one more value column of the state,
        [B, H, K, V + 1].
      scale: factor on the read; None is K ** -0.5.
      segment_ids, initial_state, chunk_size, precision: see `memformer.ops`.
      implementation: None, "recurrent", "chunked" or "pallas"; see `memformer.ops`.

    Returns:
      The output in v's dtype, and the state in float32 (float64 for float64 inputs).

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`, also for derivatives that an implementation lacks.

    Source: arXiv 2006.16236 equations 16 to 20; decay per head: 2307.08621 (RetNet), 2405.21060 (Mamba-2); per
    channel: 2312.06635 (GLA) equation 3.

    Example:
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> linear_attention(x, x, x)[0][0, :, 0, 0]
      Array([1., 2., 3.], dtype=float32)
      >>> linear_attention(x, x, x, normalize=True)[0][0, :, 0, 0]
      Array([1., 1., 1.], dtype=float32)
    """
    check_flags(normalize=normalize)
    call = make_call(
        "linear_attention",
        q,
        k,
        v,
        None,
        decay=decay,
        scale=scale,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
        precision=precision,
        normalize=normalize,
        erases=False,
    )
    prefer = preferred(call.q.shape[1], decodes=True)
    output, state = dispatch(call, implementation, IMPLEMENTATIONS, prefer, context.run, decoding.complete(call))
    if normalize:
        # At padding this would be 0 / 0; the output there is 0.
        total = output[..., -1:]
        output = output[..., :-1] / jnp.where(total == 0, jnp.ones_like(total), total)
    return output.astype(call.v.dtype), state
