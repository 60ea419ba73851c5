"""Linear attention: a matrix memory that adds every value at its key."""

import jax
import jax.numpy as jnp

from memformer.core.dispatch import dispatch
from memformer.core.types import Array, Float, Int
from memformer.ops._pallas import kernel, preference
from memformer.ops.matrix_memory.arguments import check_memory, recurrence, resolve_scale
from memformer.ops.matrix_memory.chunked import chunkwise, default_chunk

__all__ = ["linear_attention"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    normalize: bool = False,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Adds each value to the memory at its key, and reads at the query.

    S_t = exp(decay_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t

    With normalize, z_t = exp(decay_t) z_{t-1} + k_t and o_t = S_t^T q_t / (z_t . q_t) (scale cancels); queries and
    keys must then be positive (a feature map), or the sum below the line may vanish.
    A constant decay a head is RetNet, one that depends on the token is Mamba-2 (SSD), one a key channel is GLA.

    Args:
      q: queries. G may be fewer than the value heads H; query and key head g then serves the H / G value
        heads from g * H / G on.
      k: keys.
      v: values.
      decay: log decay (at most 0) of the state before each write, a head or a head and key channel; None is 0.
      normalize: divide by the sum of the weights; z is then one more value column of the state, [B, H, K, V + 1].
      scale: factor on the read; None is K ** -0.5.
      segment_ids: for packed sequences, 0 = padding: the state resets where the id changes; padding leaves
        the state alone and reads zero.
      initial_state: state to start from, as an earlier call returned it; None is zeros.
      chunk_size: tokens a chunk of the chunked form; None lets the library choose.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.
      implementation: None (the best that works here), "recurrent", "chunked" or "pallas".

    Returns:
      The output in v's dtype, and the state after the last token (of the last segment) in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name; the message names it.
      NotImplementedError: the named implementation cannot serve.

    Source: arXiv 2006.16236 equations 16 to 20; decay a head: 2307.08621 (RetNet), 2405.21060 (Mamba-2); a channel:
    2312.06635 (GLA) equation 3.

    Example:
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> linear_attention(x, x, x)[0][0, :, 0, 0]
      Array([1., 2., 3.], dtype=float32)
      >>> linear_attention(x, x, x, normalize=True)[0][0, :, 0, 0]
      Array([1., 1., 1.], dtype=float32)
    """
    memory, dims = check_memory(
        q,
        k,
        v,
        None,
        decay=decay,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
        columns=int(normalize),
    )
    if normalize:
        one = jnp.ones_like(memory.v[..., :1])
        memory = memory._replace(v=jnp.concatenate([memory.v, one], axis=-1))
    scale = resolve_scale(scale, dims["K"])
    candidates = {
        "recurrent": lambda: recurrence(memory, scale, precision),
        "chunked": lambda: chunkwise(memory, scale, chunk_size or default_chunk(memory), precision),
        "pallas": lambda: kernel("linear_attention", memory, scale, chunk_size, precision),
    }
    output, state = dispatch("linear_attention", implementation, candidates, preference(memory.q.shape[1]))
    if normalize:
        # Padding reads 0 / 0, which is to be 0.
        total = output[..., -1:]
        output = output[..., :-1] / jnp.where(total == 0, jnp.ones_like(total), total)
    return output.astype(v.dtype), state
