"""DeltaFormer: attention whose values are written by the delta rule, with any similarity for both write and read."""

from jax import lax

from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings
from memformer.core.similarity import Kernel, resolve_kernel
from memformer.core.types import Array, Float, Int
from memformer.ops.attention import context, decoding, recurrent, tiled
from memformer.ops.attention.arguments import make_call
from memformer.ops.attention.cache import DeltaCache
from memformer.ops.attention.documents import append
from memformer.pallas.platform import preferred

__all__ = ["deltaformer"]

IMPLEMENTATIONS = {"recurrent": recurrent.deltaformer, "chunked": tiled.deltaformer, "pallas": decoding.deltaformer}


@keep_shardings
def deltaformer(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    w: Float[Array, "B T G K"] | None = None,
    alpha: Float[Array, "B T G"] | None = None,
    beta: Float[Array, "B T G"] | None = None,
    decay: Float[Array, "B T G"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    write_kernel: str | Kernel = "softmax",
    read_kernel: str | Kernel = "softmax",
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: DeltaCache | None = None,
    chunk_size: int | None = None,
    precision: str | lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], DeltaCache]:
    """Writes at each key the part of its value that is new, and reads the writes at the query.

        u_t = alpha_t v_t - beta_t sum_{i < t} kappa1(k_i, w_t) u_i;  o_t = sum_{i <= t} kappa2(k_i, q_t) u_i

    beta = 0 with a softmax read is softmax attention; both kernels linear is `delta_rule` with the same w, alpha, beta
    and decay (scale 1). With g = decay_{i+1} + ... + decay_t, a decay adds g to the logits of a softmax and multiplies
    the other kernels by exp(g). The write belongs to the keys: w, alpha, beta, decay and u have G heads, only q has H.
    Memory is linear in T, backward too: scores live one tile at a time and are recomputed for gradients. The gradient
    of a gradient in reverse mode needs implementation="recurrent"; see `memformer.ops` for all derivatives.

    The write solves a triangular system. With the kernels that do not normalise (linear, relu, exp, round) keep keys
    at unit length (`memformer.l2norm`) and beta in [0, 2]: with long keys u itself grows without bound.

    Args:
      q: queries; H is a multiple of G, and head h reads key/value head h // (H / G).
      k: keys.
      v: values.
      w: where to erase; None is k.
      alpha: write strength; None is 1.
      beta: erase strength; None is 1.
      decay: log decay (at most 0) of earlier writes at each token, for writing and reading; None is 0. -inf hides them.
      sinks: logit per head of a slot without a value, for a softmax read; None is no such slot.
      write_kernel: kappa1, a `Kernel` or its name; a softmax runs over the tokens before t.
      read_kernel: kappa2, a `Kernel` or its name; a softmax runs over the tokens up to t.
      window: how many tokens back a token writes and reads, itself included; padding does not count. None is no limit.
      segment_ids: for packed sequences, 0 = padding: a token sees its own segment only; padding is not seen and its
        output is zero.
      initial_state: cache of an earlier call, or from `memformer.init_cache`; it belongs to the first segment.
        With an axis of documents, [B, P, S, ...], segment p of a row has cache p (`memformer.ops`).
      chunk_size, precision: see `memformer.ops`.
      implementation: None, "recurrent", "chunked" or "pallas"; see `memformer.ops`.

    Returns:
      The output in v's dtype, and the cache of keys and writes u: one slot longer per token, or the given fixed cache
      with the tokens in it. Sums and u are float32 (float64 for float64 inputs).

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`. A fixed cache without room for the call is a ValueError;
        under jit it is an error of the running program.

    Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), equations 8 and 9; the decay is ours,
    after arXiv 2412.06464 (linear) and 2503.02130 (softmax).

    Example:
      >>> k = jnp.array([1.0, 1.0]).reshape(1, 2, 1, 1)
      >>> v = jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
      >>> o, cache = deltaformer(k, k, v, write_kernel="linear", read_kernel="linear")
      >>> cache.u[0, :, 0, 0], o[0, :, 0, 0]
      (Array([3., 2.], dtype=float32), Array([3., 5.], dtype=float32))
    """
    read_kernel = resolve_kernel("read_kernel", read_kernel)
    if sinks is not None and not read_kernel.normalized:
        raise ValueError(f"sinks must be None where read_kernel is not softmax, got a {read_kernel.name} kernel")
    call, segments = make_call(
        "deltaformer",
        q,
        k,
        v,
        cache=DeltaCache,
        w=w,
        alpha=alpha,
        beta=beta,
        decay=decay,
        sinks=sinks,
        write_kernel=resolve_kernel("write_kernel", write_kernel),
        read_kernel=read_kernel,
        window=window,
        segment_ids=segment_ids,
        initial_state=initial_state,
        chunk_size=chunk_size,
        precision=precision,
    )
    prefer = preferred(call.q.shape[1], few=1, decodes=decoding.decodes(call))
    output, u = dispatch(call, implementation, IMPLEMENTATIONS, prefer, context.run, decoding.complete(call))
    return output.astype(call.v.dtype), append(DeltaCache, initial_state, segments, call.k, u, call.decay)
