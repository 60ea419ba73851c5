"""The delta rule: a matrix memory that replaces the value stored at a key instead of adding to it."""

import jax

from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings
from memformer.core.types import Array, Float, Int
from memformer.ops.matrix_memory import chunked, context, decoding, recurrent
from memformer.ops.matrix_memory.arguments import make_call
from memformer.pallas.platform import preferred

__all__ = ["delta_rule"]

IMPLEMENTATIONS = {"recurrent": recurrent.run, "chunked": chunked.run, "pallas": decoding.run}


@keep_shardings
def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    w: Float[Array, "B T G K"] | None = None,
    alpha: Float[Array, "B T H"] | None = None,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | Float[Array, "B P H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | Float[Array, "B P H K V"]]:
    """Writes each value at its key by the delta rule, and reads at the query.

        S' = exp(decay_t) S_{t-1};  S_t = S' + k_t (alpha_t v_t - beta_t S'^T w_t)^T;  o_t = scale S_t^T q_t

    With w and alpha left out a write replaces the fraction beta of what is stored at its key:
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T. Without decay this is DeltaNet, with a decay per head the gated delta
    rule, with a decay per key channel Kimi delta attention. An erase vector w of its own gives Comba (w = d k) and
    erase gates per key channel (w = gate * k); `deltaformer` is the same update with a similarity in place of each
    inner product. Keys should have unit length (`memformer.l2norm`): with long keys the rule itself diverges. beta
    in (0, 1) blends the old value with the new; beta in (1, 2) overshoots, which state tracking needs.

    Args:
      q: queries. G may be less than the number of value heads H; query and key head g then serves the H / G value
        heads from g H / G on.
      k: keys.
      v: values.
      beta: erase strength, the fraction of the stored value that is removed.
      w: where to erase; None is k.
      alpha: write strength; None is beta (in `deltaformer` it is 1).
      decay: log decay (at most 0) of the state before each token, per head or per head and key channel; None is 0.
      scale: factor on the read; None is K ** -0.5.
      segment_ids, initial_state, chunk_size, precision: see `memformer.ops`.
      implementation: None, "recurrent", "chunked" or "pallas"; see `memformer.ops`.

    Returns:
      The output in v's dtype, and the state in float32 (float64 for float64 inputs).

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`, also for derivatives that an implementation lacks.

    Source: DeltaNet, arXiv 2406.06484 equation 1; gated: 2412.06464 equation 10; per channel: 2510.26692; an erase
    vector of its own: DeltaFormer (NeurIPS 2025) equation 8 with linear kernels.

    Example:
      >>> k = jnp.eye(4)[None, jnp.array([0, 1, 0]), None]
      >>> v = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> output, state = delta_rule(k, k, v, jnp.ones((1, 3, 1)), scale=1.0)
      >>> state[0, 0, :, 0]
      Array([3., 2., 0., 0.], dtype=float32)
    """
    call = make_call(
        "delta_rule",
        q,
        k,
        v,
        beta,
        w=w,
        alpha=alpha,
        decay=decay,
        scale=scale,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
        precision=precision,
    )
    prefer = preferred(call.q.shape[1], decodes=True)
    output, state = dispatch(call, implementation, IMPLEMENTATIONS, prefer, context.run, decoding.complete(call))
    return output.astype(call.v.dtype), state
