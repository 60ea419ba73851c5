"""Softmax attention: a memory that keeps every key and value and reads by a normalised similarity."""

from jax import lax

from memformer.core.checks import check_flags
from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Float, Int
from memformer.ops.attention import context, cudnn, decoding, recurrent, tiled
from memformer.ops.attention.arguments import make_call
from memformer.ops.attention.cache import KVCache
from memformer.ops.attention.documents import append
from memformer.pallas.platform import preferred

__all__ = ["softmax_attention"]

IMPLEMENTATIONS = {
    "recurrent": recurrent.softmax_attention,
    "chunked": tiled.softmax_attention,
    "pallas": decoding.softmax_attention,
    "cudnn": cudnn.softmax_attention,
}


@keep_shardings
def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    decay: Float[Array, "B T H"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: KVCache | None = None,
    chunk_size: int | None = None,
    precision: str | lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], KVCache]:
    """Reads a mean of the values, weighted by the softmax of inner products.

        o_t = sum_{i <= t} p_ti v_i;  p_ti = exp(s_ti) / (exp(sink) + sum_{j <= t} exp(s_tj))
        s_ti = scale q_t . k_i + decay_{i+1} + ... + decay_t

    Without sinks the sum alone divides. With a decay this is the Forgetting Transformer: what is older weighs less.
    Memory is linear in T, backward too: scores live one tile at a time and are recomputed for gradients. The gradient
    of a gradient in reverse mode needs implementation="recurrent"; see `memformer.ops` for all derivatives.

    Args:
      q: queries; H is a multiple of G, and head h reads key/value head h // (H / G).
      k: keys.
      v: values.
      decay: log decay (at most 0) of earlier tokens at each token, per head; None is 0. -inf hides them.
      sinks: logit per head of a slot without a value, so that a query may read nothing; None is no such slot.
      causal: False lets every query see the whole segment (an encoder); it takes no initial_state and no decay.
      window: how many tokens back a query sees, itself included; without causal, also as many ahead. Padding does not
        count. None is no limit.
      scale: factor on inner products; None is K ** -0.5.
      segment_ids: for packed sequences, 0 = padding: a query sees its own segment only; padding is not seen and its
        output is zero.
      initial_state: cache of an earlier call, or from `memformer.init_cache`; it belongs to the first segment.
        With an axis of documents, [B, P, S, ...], segment p of a row has cache p (`memformer.ops`).
      chunk_size, precision: see `memformer.ops`.
      implementation: None, "recurrent", "chunked", "pallas" or "cudnn" (which None prefers on an sm_90 GPU where it
        serves); see `memformer.ops`.

    Returns:
      The output in v's dtype, and the cache: one slot longer per token, or the given fixed cache with the tokens in
      it. Sums are kept in float32 (float64 for float64 inputs).

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`. A fixed cache without room for the call is a ValueError;
        under jit it is an error of the running program.

    Source: Vaswani et al., arXiv 1706.03762 equation 1; tiles with a running maximum: arXiv 2205.14135; decay:
    Forgetting Transformer, arXiv 2503.02130; sinks: gpt-oss, arXiv 2508.10925.

    Example:
      >>> q = jnp.zeros((1, 2, 4, 8))
      >>> k, v = jnp.zeros((1, 2, 1, 8)), jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
      >>> o, cache = softmax_attention(q, k, v)
      >>> o[0, :, 0, 0]
      Array([2., 3.], dtype=float32)
      >>> o, cache = softmax_attention(q[:, :1], k[:, :1], v[:, :1], initial_state=cache)
      >>> cache.k.shape
      (1, 3, 1, 8)
    """
    check_flags(causal=causal)
    if not causal and decay is not None:
        raise ValueError("decay must be None where causal is False: it has no direction there")
    if not causal and initial_state is not None:
        raise ValueError(
            "initial_state must be None where causal is False: the tokens of the earlier call have read already, "
            "without those of this one. Pass the whole sequence in one call"
        )
    call, segments = make_call(
        "softmax_attention",
        q,
        k,
        v,
        cache=KVCache,
        decay=decay,
        sinks=sinks,
        read_kernel=Kernel("softmax", scale),
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
        precision=precision,
    )
    prefer = preferred(call.q.shape[1], few=1, library="cudnn", decodes=decoding.decodes(call))
    output = dispatch(call, implementation, IMPLEMENTATIONS, prefer, context.run, decoding.complete(call))
    return output.astype(call.v.dtype), append(KVCache, initial_state, segments, call.k, call.v, call.decay)
