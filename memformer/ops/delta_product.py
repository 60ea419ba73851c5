"""DeltaProduct: several writes of the delta rule per token."""

import jax

from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings
from memformer.core.types import Array, Float, Int
from memformer.ops.matrix_memory import chunked, context, decoding, recurrent
from memformer.ops.matrix_memory.arguments import make_call
from memformer.pallas.platform import preferred

__all__ = ["delta_product"]

IMPLEMENTATIONS = {"recurrent": recurrent.run, "chunked": chunked.run, "pallas": decoding.run}


@keep_shardings
def delta_product(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T N G K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    *,
    w: Float[Array, "B T N G K"] | None = None,
    alpha: Float[Array, "B T N H"] | None = None,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | Float[Array, "B P H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | Float[Array, "B P H K V"]]:
    """Writes N values per token by the delta rule, in order, and reads once.

        S_{t,0} = exp(decay_t) S_{t-1}
        S_{t,n} = S_{t,n-1} + k_tn (alpha_tn v_tn - beta_tn S_{t,n-1}^T w_tn)^T for n = 1 ... N
        o_t = scale S_{t,N}^T q_t

    With w = k the transition of a token is a product of N reflections (beta up to 2), which can be any rotation in N
    dimensions. N = 1 is `delta_rule`. Keys should have unit length (`memformer.l2norm`). With w of its own a write can
    add any matrix of rank one to the transition: RWKV-7 is a write (k = b, w = -exp(-decay) a, v = 0) before the write
    of the value (w = 0).

    Args:
      q: queries. G may be less than the number of value heads H, as in `delta_rule`.
      k: keys, N per token.
      v: values.
      beta: erase strength, the fraction of the stored value that is removed.
      w: where to erase; None is k.
      alpha: write strength; None is beta.
      decay: log decay (at most 0) of the state before each token, per head or per head and key channel; None is 0.
      scale: factor on the read; None is K ** -0.5.
      segment_ids, initial_state, chunk_size, precision: see `memformer.ops`.
      implementation: None, "recurrent", "chunked" or "pallas"; see `memformer.ops`.

    Returns:
      The output in v's dtype, and the state in float32 (float64 for float64 inputs).

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`, also for derivatives that an implementation lacks.

    Source: arXiv 2502.10297 equation 4.

    Example:
      >>> k = jnp.eye(4)[None, None, :2, None]
      >>> v = jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
      >>> output, state = delta_product(jnp.ones((1, 1, 1, 4)), k, v, jnp.ones((1, 1, 2, 1)))
      >>> output, state[0, 0, :, 0]
      (Array([[[[1.5]]]], dtype=float32), Array([1., 2., 0., 0.], dtype=float32))
    """
    call = make_call(
        "delta_product",
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
        several_writes=True,
    )
    prefer = preferred(call.q.shape[1], decodes=True)
    output, state = dispatch(call, implementation, IMPLEMENTATIONS, prefer, context.run, decoding.complete(call))
    return output.astype(call.v.dtype), state
