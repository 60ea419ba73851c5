"""Layout of the chunked form: arrays of a call, and of one group of its chunks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype
from memformer.core.segments import pad_time
from memformer.core.symbolic import padding_to
from memformer.core.types import Array

__all__ = [
    "ChunkScan",
    "Inputs",
    "Masks",
    "flatten",
    "load",
    "load_group",
    "make_masks",
    "store",
    "to_chunks",
    "to_time",
]


class ChunkScan(NamedTuple):
    """Static settings of one call.

    Attributes:
      size: C, tokens per chunk.
      group: chunks per group.
      writes: N, writes per token.
      scale: factor on the read.
      precision: of the products; the inverse always runs at the highest.
    """

    size: int
    group: int
    writes: int
    scale: float
    precision: lax.Precision

    @property
    def tokens(self) -> int:
        """Tokens per group."""
        return self.size * self.group

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows per token of each of `Inputs`."""
        return (1, *(self.writes,) * 5, 1)

    def product(self, a: Array, b: Array) -> Array:
        """a @ b."""
        return jnp.matmul(a, b, precision=self.precision)


class Inputs(NamedTuple):
    """Arrays of a call or of one group, or their gradients; None where absent.

    A call's are [B, T, H, width], or [B, T N, H, width] for what each write has; a group's are [M, B, H, C, width] or
    [M, B, H, C N, width], with M chunks.
    """

    q: Array
    k: Array
    v: Array
    w: Array | None
    alpha: Array | None
    beta: Array | None
    decay: Array | None


class Masks(NamedTuple):
    """Segments inside the chunks of a group.

    Attributes:
      same: [M, B, 1, C, C] pairs of tokens in one segment.
      decay_in: [M, B, 1, C, 1] tokens in the segment that the chunk starts in, as factors.
      decay_out: [M, B, 1, C, 1] tokens in the segment that the chunk ends in.
      chunk_decay: [M, B, 1, 1, 1] whether those two are one segment.
    """

    same: Array
    decay_in: Array
    decay_out: Array
    chunk_decay: Array


def flatten(plan: ChunkScan, inputs: Inputs, index: Array | None):
    """Arrays [B, T, H width] with time in whole groups; segments of each group, and the one that each chunk starts in.

    Groups are sliced in place: a scan over an axis of groups, or one more axis of size 1, makes the compiler copy
    every input first.
    """
    pairs = zip(inputs, plan.rows, strict=True)
    flat = Inputs(*(None if x is None else pad_time(x.reshape(*x.shape[:2], -1), plan.tokens * n) for x, n in pairs))
    if index is None:
        return flat, None
    # Padding at the end belongs to the last segment, so that the final state is the last segment's.
    index = jnp.pad(index, ((0, 0), (0, padding_to(index.shape[1], plan.tokens))), mode="edge")
    chunks = index.reshape(index.shape[0], -1, plan.size)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)))

    def by_group(x):
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, plan.group, *x.shape[1:])

    return flat, (by_group(chunks), by_group(before))


def load(x: Array, i: Array, rows: int) -> Array:
    """Rows of group i of a flat array."""
    return lax.dynamic_slice_in_dim(x, i * jnp.int32(rows), rows, axis=1)


def store(x: Array, new: Array, i: Array) -> Array:
    """Writes the rows of group i into a flat array."""
    new = new.reshape(*new.shape[:2], -1)
    return lax.dynamic_update_slice_in_dim(x, new, i * jnp.int32(new.shape[1]), axis=1)


def to_chunks(x: Array, chunks: int) -> Array:
    """[B, T, H, width] of a group to [M, B, H, C, width]."""
    batch, _, heads, width = x.shape
    return x.reshape(batch, chunks, -1, heads, width).transpose(1, 0, 3, 2, 4)


def to_time(x: Array) -> Array:
    """The inverse of `to_chunks`."""
    _, batch, heads, _, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)


def load_group(plan: ChunkScan, flat: Inputs, inputs: Inputs, i: Array, segments) -> tuple[Inputs, Masks | None]:
    """Group i in the accumulation dtype, with the shapes of `inputs`, and its masks."""
    dtype = accumulation_dtype(inputs.q, inputs.k, inputs.v)

    def load_rows(x, like, writes):
        if x is None:
            return None
        rows = load(x, i, plan.tokens * writes).reshape(x.shape[0], -1, *like.shape[2:])
        return to_chunks(rows, plan.group).astype(dtype)

    group = Inputs(*map(load_rows, flat, inputs, plan.rows))
    if segments is None:
        return group, None
    return group, make_masks(segments, dtype)


def make_masks(segments: tuple[Array, ...], dtype) -> Masks:
    """Masks of chunks, from the segment of each token [M, B, C] and the one that each chunk starts in [M, B]."""
    index, before = segments
    same = index[..., :, None] == index[..., None, :]
    factors = index == before[..., None], index == index[..., -1:], index[..., -1:] == before[..., None]
    return Masks(same[:, :, None], *(x[:, :, None, :, None].astype(dtype) for x in factors))
