"""The delta rule: a matrix memory that replaces what a key held instead of adding to it."""

import jax

from memformer.core.dispatch import dispatch
from memformer.core.types import Array, Float, Int
from memformer.ops._pallas import kernel, preference
from memformer.ops.matrix_memory.arguments import check_memory, recurrence, resolve_scale
from memformer.ops.matrix_memory.chunked import chunkwise, default_chunk

__all__ = ["delta_rule"]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Writes each value at its key by the delta rule, and reads at the query.

    S' = exp(decay_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T;  o_t = scale S_t^T q_t

    Without decay this is DeltaNet, with one decay a head the gated delta rule, with one a key channel
    Kimi delta attention. Keys should have length 1 (`memformer.l2norm`): with long keys the rule itself
    diverges. beta in (0, 1) blends the old value with the new; beta in (1, 2) overshoots, which state tracking needs.

    Args:
      q: queries. G may be fewer than the value heads H; query and key head g then serves the H / G value
        heads from g * H / G on.
      k: keys.
      v: values.
      beta: how much of what the key held is replaced.
      decay: log decay (at most 0) of the state before each write, a head or a head and key channel; None is 0.
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

    Source: DeltaNet, arXiv 2406.06484 equation 1; gated: 2412.06464 equation 10; per channel: 2510.26692.

    Example:
      >>> k = jnp.eye(4)[None, jnp.array([0, 1, 0]), None]
      >>> v = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> output, state = delta_rule(k, k, v, jnp.ones((1, 3, 1)), scale=1.0)
      >>> state[0, 0, :, 0]
      Array([3., 2., 0., 0.], dtype=float32)
    """
    memory, dims = check_memory(
        q,
        k,
        v,
        beta,
        decay=decay,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
    )
    scale = resolve_scale(scale, dims["K"])
    candidates = {
        "recurrent": lambda: recurrence(memory, scale, precision),
        "chunked": lambda: chunkwise(memory, scale, chunk_size or default_chunk(memory), precision),
        "pallas": lambda: kernel("delta_rule", memory, scale, chunk_size, precision),
    }
    output, state = dispatch("delta_rule", implementation, candidates, preference(memory.q.shape[1]))
    return output.astype(v.dtype), state
