"""Chunks of time, and segments of packed sequences.

All ops treat segments alike: id 0 is padding, which leaves the state unchanged and whose output is zero; the state
resets where the id changes (padding between two equal ids is no change); the initial state belongs to the first
segment of the call, and the returned state is that of the last segment.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check_array
from memformer.core.symbolic import is_symbolic, padding_to
from memformer.core.types import Array, Bool, Dims, Int

__all__ = ["Segments", "check_documents", "chunk_time", "clear", "find_segments", "pad_time", "unchunk_time"]


class Segments(NamedTuple):
    """The segment of each token.

    Attributes:
      index: segments counted from 0 in order of time; a padding token has the index of the segment before it (0
        before the first). The initial state belongs to index 0.
      valid: False at padding.
    """

    index: Int[Array, "B T"]  # type: ignore[assignment]
    valid: Bool[Array, "B T"]


def find_segments(segment_ids: Int[Array, "B T"] | None, dims: Dims) -> Segments | None:
    """Numbers the segments of a packed batch; None where nothing is packed.

    Args:
      segment_ids: [B, T] integers, 0 = padding, or None.
      dims: sizes of B and T.

    Raises:
      ValueError: the array is not [B, T] or not integers.

    Example:
      >>> find_segments(jnp.array([[0, 3, 3, 0, 3, 5]]), {"B": 1, "T": 6}).index
      Array([[0, 0, 0, 0, 0, 1]], dtype=int32)
    """
    if segment_ids is None:
        return None
    ids = check_array("segment_ids", segment_ids, "B T", dims, kind=jnp.integer)
    valid = ids != 0
    # Last valid position at or before each token, -1 before the first.
    place = jnp.where(valid, jnp.arange(ids.shape[1], dtype=jnp.int32), jnp.int32(-1))
    place = lax.cummax(place, axis=1)
    filled = jnp.take_along_axis(ids, jnp.maximum(place, 0), axis=1)
    started = place >= 0
    change = (filled[:, 1:] != filled[:, :-1]) & started[:, :-1]
    change = jnp.pad(change, ((0, 0), (1, 0)))
    return Segments(jnp.cumsum(change, axis=1, dtype=jnp.int32), valid)


def check_documents(segments: Segments, room: int) -> None:
    """Raises ValueError where a row has more segments than states; the running program does if they are not known."""
    found = jnp.max(segments.index) + 1
    if not isinstance(found, jax.core.Tracer):
        _raise_documents(room, found > room, found)
        return

    def report():
        jax.debug.callback(functools.partial(_raise_documents, room), found > room, found)

    lax.cond(found > room, report, lambda: None)


def _raise_documents(room: int, more: Any, found: Any) -> None:
    # Under vmap both branches of the condition run: only `more` tells.
    if np.any(more):
        raise ValueError(f"initial_state has states of {room} documents per row, got {np.max(found)} segments in a row")


def clear(valid: Bool[Array, "B T"] | None, x: Array | None) -> Array | None:
    """Sets x [B, T, ...] to zero where it is not valid.

    Operands are cleared rather than multiplied by zero, so that NaN and infinity at padding reach neither outputs nor
    gradients.
    """
    if valid is None or x is None:
        return x
    return jnp.where(lax.expand_dims(valid, range(2, x.ndim)), x, jnp.zeros((), x.dtype))


def pad_time(x: Array, multiple: int, axis: int = 1) -> Array:
    """Pads `axis` with zeros to the next multiple."""
    missing = padding_to(x.shape[axis], multiple)
    if not is_symbolic(missing) and not missing:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, missing)
    return jnp.pad(x, width)


def chunk_time(x: Array, size: int) -> Array:
    """[B, T, ...] to [N, B, C, ...], chunks first as `lax.scan` takes them; pads T with zeros."""
    x = pad_time(x, size)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def unchunk_time(x: Array, length: int) -> Array:
    """[N, B, C, ...] back to [B, T, ...], padding dropped."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
