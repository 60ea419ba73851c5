"""Softmax attention: a memory that keeps every pair and reads by a normalised similarity."""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.checks import check_array, check_multiple, check_positive
from memformer.core.dispatch import dispatch
from memformer.core.numerics import matmul_precision
from memformer.core.segments import find_segments
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Dims, Float, Int
from memformer.ops._pallas import attention_kernel, preference
from memformer.ops.attention.cache import KVCache, append, check_cache, empty, make_timeline
from memformer.ops.attention.cudnn import cudnn_attention
from memformer.ops.attention.recurrent import Reading, read_rows, read_tiles

__all__ = ["KVCache", "init_cache", "softmax_attention"]

GROUPS = "query heads must be a multiple of key/value heads"


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: KVCache | None = None,
    chunk_size: int | None = None,
    precision: str | lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], KVCache]:
    """Reads a mean of the values, weighed by the softmax of inner products.

    o_t = sum_{i <= t} p_ti v_i;  p_ti = exp(scale q_t . k_i) / sum_{j <= t} exp(scale q_t . k_j)

    Memory is linear in T, backward too: scores live one tile at a time and are computed again for gradients.

    Args:
      q: queries; H is a multiple of G, and head h reads key/value head h // (H / G).
      k: keys.
      v: values.
      causal: False lets every query see the whole segment (an encoder).
      window: how many tokens a query sees back in time, itself included; without causal, also as many ahead.
        Padding does not count. None is no limit.
      scale: factor on inner products; None is K ** -0.5.
      segment_ids: for packed sequences, 0 = padding: a query sees its own segment only; padding is not seen and
        reads zero.
      initial_state: cache of an earlier call, or from `init_cache`; it belongs to the first segment.
      chunk_size: side of a tile of scores in the chunked form; None lets the library choose.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.
      implementation: None (the best that works here: on an sm_90 GPU cuDNN where it can serve), "recurrent",
        "chunked", "pallas" or "cudnn".

    Returns:
      The output in v's dtype, and the cache: one slot longer for each token, or the given buffer with the tokens
      in it. Sums are kept in float32 (float64 for float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name, or a full buffer; the message names the argument.
        Under jit a full buffer is an error of the running program.
      NotImplementedError: the named implementation cannot serve.

    Source: Vaswani et al., arXiv 1706.03762 equation 1; tiles with a running maximum: arXiv 2205.14135.

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
    dims: Dims = {}
    q = check_array("q", q, "B T H K", dims)
    k = check_array("k", k, "B T G K", dims)
    v = check_array("v", v, "B T G V", dims)
    check_multiple("H", "G", dims, GROUPS)
    check_positive("window", window)
    check_positive("chunk_size", chunk_size)
    if not causal and initial_state is not None:
        raise ValueError(
            "initial_state must be None where causal is False: the tokens of the earlier call have read already, "
            "without those of this one. Give the whole sequence in one call"
        )
    cache = check_cache(initial_state, KVCache, dims, "softmax_attention")
    kernel = Kernel("softmax", scale)
    segments = find_segments(segment_ids, dims)
    reading = Reading(
        kernel, kernel.scale_for(dims["K"]), causal, window, chunk_size, matmul_precision(precision, q, k, v)
    )
    timeline = make_timeline(cache, segments, dims, ranks=window is not None)
    output = dispatch(
        "softmax_attention",
        implementation,
        {"recurrent": read_rows, "chunked": read_tiles, "pallas": attention_kernel, "cudnn": cudnn_attention},
        preference(dims["T"], few=1, library="cudnn"),
        reading,
        timeline,
        cache,
        q,
        k,
        v,
    )
    return output.astype(v.dtype), append(KVCache, cache, segments, k, v)


def init_cache(
    batch: int, capacity: int, groups: int, key_width: int, value_width: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> KVCache:
    """A fixed buffer for `capacity` tokens: calls that take it as initial_state write in place.

    Args:
      batch: B.
      capacity: S, the tokens it holds before it is full.
      groups: G, key/value heads.
      key_width: K.
      value_width: V.
      dtype: of keys and values in the buffer.

    Raises:
      ValueError: a size below 1.

    Example:
      >>> init_cache(1, 16, 2, 8, 8).k.shape
      (1, 16, 2, 8)
    """
    return empty(KVCache, (batch, capacity, groups, key_width, value_width), dtype, dtype)
