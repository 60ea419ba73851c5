"""DeltaProduct: several delta steps a token."""

import jax

from memformer.core.dispatch import dispatch
from memformer.core.types import Array, Float, Int
from memformer.ops._pallas import kernel, preference
from memformer.ops.matrix_memory.arguments import check_memory, recurrence, resolve_scale
from memformer.ops.matrix_memory.chunked import chunkwise, default_chunk

__all__ = ["delta_product"]


def delta_product(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N H K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    *,
    decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Writes N values a token by the delta rule, in order, and reads once.

    S_{t,0} = exp(decay_t) S_{t-1};  S_{t,n} = S_{t,n-1} + beta_tn k_tn (v_tn - S_{t,n-1}^T k_tn)^T for n = 1 ... N;
    o_t = scale S_{t,N}^T q_t

    The transition of a token is a product of N reflections (beta up to 2), which can be any rotation in N
    dimensions. One step is `delta_rule`. Keys should have length 1 (`memformer.l2norm`).

    Args:
      q: queries.
      k: keys, N a token.
      v: values.
      beta: how much of what each key held is replaced.
      decay: log decay (at most 0) of the state before each token, a head or a head and key channel; None is 0.
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

    Source: arXiv 2502.10297 equation 4.

    Example:
      >>> k = jnp.eye(4)[None, None, :2, None]
      >>> v = jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
      >>> output, state = delta_product(jnp.ones((1, 1, 1, 4)), k, v, jnp.ones((1, 1, 2, 1)))
      >>> output, state[0, 0, :, 0]
      (Array([[[[1.5]]]], dtype=float32), Array([1., 2., 0., 0.], dtype=float32))
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
        steps=True,
    )
    scale = resolve_scale(scale, dims["K"])
    candidates = {
        "recurrent": lambda: recurrence(memory, scale, precision),
        "chunked": lambda: chunkwise(memory, scale, chunk_size or default_chunk(memory), precision),
        "pallas": lambda: kernel("delta_product", memory, scale, chunk_size, precision),
    }
    output, state = dispatch("delta_product", implementation, candidates, preference(memory.q.shape[1]))
    return output.astype(v.dtype), state
