"""Checked arguments of the attention ops, as one `AttentionCall`."""

import dataclasses
from functools import partial

import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.checks import check_array, check_multiple, check_positive
from memformer.core.mask import make_mask
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import Segments, check_documents, clear, find_segments
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Dims
from memformer.ops.attention.cache import Cache, check_cache, check_room, clear_slots, sum_decay
from memformer.ops.attention.documents import Documents, find_documents, flatten, place_mask, sum_decays

__all__ = ["make_call", "write_operands"]

GROUPS = "query heads must be a multiple of key/value heads"
_MOST = 2**31 - 1


def make_call(
    op: str,
    q,
    k,
    v,
    *,
    cache: type[Cache],
    read_kernel: Kernel,
    write_kernel: Kernel | None = None,
    w=None,
    alpha=None,
    beta=None,
    decay=None,
    sinks=None,
    causal: bool = True,
    window=None,
    segment_ids,
    initial_state,
    chunk_size,
    precision,
) -> tuple[AttentionCall, Segments | Documents | None]:
    """Checks the arguments of a public function and brings them to the layout of `AttentionCall`.

    Args:
      op: name of the public function.
      q, k, v, w, alpha, beta, decay, sinks, window, segment_ids, initial_state, chunk_size, precision: its arguments.
      cache: type of its state.
      read_kernel, write_kernel: as in `AttentionCall`, with or without a scale.
      causal: as in `AttentionCall`.

    Returns:
      The call, and the segments (with a cache per document: the documents) that the cache is appended with.

    Raises:
      ValueError: names the argument.
    """
    dims: Dims = {}
    q = check_array("q", q, "B T H K", dims)
    k = check_array("k", k, "B T G K", dims)
    v = check_array("v", v, "B T G V", dims)
    check_multiple("H", "G", dims, GROUPS)
    w = None if w is None else check_array("w", w, "B T G K", dims)
    alpha = None if alpha is None else check_array("alpha", alpha, "B T G", dims)
    beta = None if beta is None else check_array("beta", beta, "B T G", dims)
    decay = None if decay is None else check_array("decay", decay, f"B T {'H' if write_kernel is None else 'G'}", dims)
    sinks = None if sinks is None else check_array("sinks", sinks, "H", dims)
    window = check_positive("window", window)
    # Ranks are int32, and no sequence is longer.
    window = None if window is not None and window > _MOST else window
    chunk_size = check_positive("chunk_size", chunk_size)
    segments = find_segments(segment_ids, dims)
    state = check_cache(initial_state, cache, dims, op)
    valid = None if segments is None else segments.valid
    q, k, v, w, alpha, beta, decay = (clear(valid, x) for x in (q, k, v, w, alpha, beta, decay))
    cache_valid = None if state is None else state.valid
    documents = None if state is None or cache_valid.ndim == 2 else _find_documents(state, segments, dims)
    slots = state if documents is None or state is None else flatten(state)
    mask = make_mask(None if slots is None else slots.valid, segments, dims, ranks=window is not None)
    sums = None
    if documents is not None:
        mask, sums = place_mask(mask, cache_valid, documents), partial(sum_decays, documents=documents)
    call = AttentionCall(
        op=op,
        q=q,
        k=k,
        v=v,
        w=w,
        alpha=alpha,
        beta=beta,
        decay=sum_decay(state, decay, accumulation_dtype(q, k, v), sums),
        sinks=sinks,
        write_kernel=None if write_kernel is None else _with_scale(write_kernel, dims["K"]),
        read_kernel=_with_scale(read_kernel, dims["K"]),
        mask=mask,
        causal=causal,
        window=window,
        cache=None if slots is None else clear_slots(slots),
        documents=documents is not None,
        precision=matmul_precision(precision, q, k, v, w),
        chunk_size=chunk_size,
    )
    return call, segments if documents is None else documents


def _find_documents(state: Cache, segments: Segments | None, dims: Dims) -> Documents:
    """The documents of a call whose rows have several caches."""
    if segments is not None:
        check_documents(segments, dims["P"])
    documents = find_documents(segments, (dims["B"], dims["T"]), dims["P"])
    if state.fixed:
        check_room(state, jnp.max(documents.counts))
    return documents


def _with_scale(kernel: Kernel, width: int) -> Kernel:
    return dataclasses.replace(kernel, scale=kernel.scale_for(width))


def write_operands(call: AttentionCall) -> tuple[Array, Array, Array]:
    """w, alpha v and beta of a DeltaFormer call, defaults filled in; the last two in the accumulation dtype."""
    w = call.k if call.w is None else call.w
    dtype = accumulation_dtype(call.q, call.k, call.v, w)
    target = call.v.astype(dtype)
    if call.alpha is not None:
        target = target * call.alpha.astype(dtype)[..., None]
    beta = jnp.ones(call.k.shape[:3], dtype) if call.beta is None else call.beta.astype(dtype)
    return w, target, beta
