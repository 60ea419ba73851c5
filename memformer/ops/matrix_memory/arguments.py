"""Checked arguments of the matrix memories, as one `MatrixCall`."""

import math

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.checks import check_array, check_multiple, check_number, check_positive
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import check_documents, clear, find_segments
from memformer.core.sharding import vary_like
from memformer.core.types import Dims

__all__ = ["make_call"]

GROUPS = "value heads must be a multiple of query and key heads"


def make_call(
    op: str,
    q,
    k,
    v,
    beta,
    *,
    w=None,
    alpha=None,
    decay,
    scale,
    segment_ids,
    initial_state,
    chunk_size,
    precision,
    several_writes: bool = False,
    normalize: bool = False,
    erases: bool = True,
) -> MatrixCall:
    """Checks the arguments of a public function and brings them to the layout of `MatrixCall`.

    Args:
      op: name of the public function.
      q, k, v, beta, w, alpha, decay, scale, segment_ids, initial_state, chunk_size, precision: its arguments.
      several_writes: whether k, v, w, alpha and beta have an axis of writes after time.
      normalize: whether the state has one more value column, of the keys' sum.
      erases: False for an op without beta, which is None then.

    Raises:
      ValueError: names the argument.
    """
    dims: Dims = {}
    time = "B T N" if several_writes else "B T"
    q = check_array("q", q, "B T G K", dims)
    k = check_array("k", k, f"{time} G K", dims)
    v = check_array("v", v, f"{time} H V", dims)
    check_multiple("H", "G", dims, GROUPS)
    beta = check_array("beta", beta, f"{time} H", dims) if erases else None
    w = None if w is None else check_array("w", w, f"{time} G K", dims)
    alpha = None if alpha is None else check_array("alpha", alpha, f"{time} H", dims)
    if decay is not None:
        decay = check_array("decay", decay, "B T H K" if getattr(decay, "ndim", 3) == 4 else "B T H", dims)
    dtype = accumulation_dtype(q, k, v)
    if initial_state is not None:
        state_dims = dims | {"V": dims["V"] + int(normalize)}
        letters = "B P H K V" if getattr(initial_state, "ndim", 4) == 5 else "B H K V"
        initial_state = check_array("initial_state", initial_state, letters, state_dims).astype(dtype)
    segments = find_segments(segment_ids, dims)
    if segments is not None and initial_state is not None and initial_state.ndim == 5:
        check_documents(segments, initial_state.shape[1])
    scale = 1.0 / math.sqrt(dims["K"]) if scale is None else check_number("scale", scale)
    chunk_size = check_positive("chunk_size", chunk_size)
    precision = matmul_precision(precision, q, k, v, w)
    valid = None if segments is None else segments.valid
    q, k, v, w, alpha, beta, decay = (clear(valid, x) for x in (q, k, v, w, alpha, beta, decay))
    if normalize:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if several_writes:
        rows = (None if x is None else x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v, w, alpha, beta))
        k, v, w, alpha, beta = rows
    if initial_state is None:
        zeros = jnp.zeros((dims["B"], dims["H"], dims["K"], v.shape[-1]), dtype)
        initial_state = vary_like(zeros, q, k, v, w, alpha, beta, decay)
    return MatrixCall(
        op=op,
        q=q,
        k=k,
        v=v,
        w=w,
        alpha=alpha,
        beta=beta,
        decay=decay,
        segments=segments,
        state=initial_state,
        writes=dims.get("N", 1),
        scale=scale,
        precision=precision,
        chunk_size=chunk_size,
    )
