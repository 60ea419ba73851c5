"""What is one number a token and head: strength of the write, decay, segments.

One float32 array [B, H, N, names, C], names in the order of `Cut.names`:

    beta     strength of the write; not quite 0, since its gradient is something that it multiplies, divided by it
    enter    how a token sees the state that enters the chunk; the last token's is what the chunk keeps of it
    leave    how a write reaches the state that leaves the chunk
    total    log decay since the start of the chunk
    segment  index of the token's segment

and "-beta", "-total", "-segment", their negatives: a row is loaded either for the rows of a matrix or for its
columns, since the compiler merges two loads of one row, and then finds no layout for it.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.segments import pad_time
from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.common import Cut, column, row

__all__ = ["Tokens", "token_rows"]

# Strength of a write that is none.
LEAST = 2.0**-60


def token_rows(cut: Cut, beta: Array | None, decay: Array | None, index: Array | None) -> tuple[Array, ...]:
    """The array of rows, or none where a token has no numbers.

    Args:
      cut: sizes.
      beta: [B, T, H] or None.
      decay: log decay [B, T, H], or None.
      index: segment of every token [B, T], or None.
    """
    if not cut.names:
        return ()
    shape = (cut.batch, cut.chunks, cut.chunk, cut.heads)

    def cut_time(x):
        return pad_time(x.astype(jnp.float32), cut.chunk).reshape(shape)

    enter = leave = jnp.ones(shape, jnp.float32)
    rows = {}
    if beta is not None:
        beta = cut_time(beta)
        rows["beta"] = beta + lax.stop_gradient(jnp.where(jnp.abs(beta) < LEAST, LEAST - beta, 0.0))
    if decay is not None:
        total = rows["total"] = jnp.cumsum(cut_time(decay), axis=2)
        enter, leave = jnp.exp(total), jnp.exp(total[:, :, -1:] - total)
    if index is not None:
        # Padding at the end belongs to the last segment, so that the state it leaves is the last segment's.
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % cut.chunk)), mode="edge").reshape(shape[:3])
        last = index[:, :, -1]
        before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
        enter *= (index == before[:, :, None]).astype(jnp.float32)[..., None]
        leave *= (index == last[:, :, None]).astype(jnp.float32)[..., None]
        rows["segment"] = jnp.broadcast_to(index[..., None], shape).astype(jnp.float32)
    rows |= {"enter": enter, "leave": leave}
    rows |= {f"-{name}": -rows[name] for name in ("beta", "total", "segment") if name in rows}
    return (jnp.stack([rows[name] for name in cut.names], axis=-1).transpose(0, 3, 1, 4, 2),)


class Tokens:
    """The rows of one chunk in shared memory, inside a kernel.

    Args:
      cut: sizes.
      ref: [names, C], or None where a token has no numbers.
    """

    def __init__(self, cut: Cut, ref):
        self.cut, self.ref = cut, ref
        if cut.carries:
            # Now, although it is needed last: commit_smem must come between this read and the next copy to this slot.
            self._kept = ref[cut.names.index("enter"), cut.chunk - 1]

    def times(self, names: tuple[str, ...], x: Array) -> Array:
        """x [C, width], its rows multiplied by what of `names` is there."""
        for name in names:
            if name in self.cut.names:
                x = x * column(self._named(name), x.shape[1])
        return x

    def times_beta(self, x: Array) -> Array:
        """x [C, C], its columns multiplied by the strengths of the writes, if there are any."""
        return x * -row(self._named("-beta"), x.shape[0]) if self.cut.beta else x

    def over_beta(self, x: Array) -> Array:
        """x [C] divided by the strengths of the writes."""
        return x / compat.load(self._named("beta"), plgpu.Layout.WGMMA.reduce(1))

    def keep(self, state: Array) -> Array:
        """What stays of a state [K, V] over the chunk."""
        return state * self._kept if self.cut.carries else state

    def weigh(self, places: tuple[Array, Array], *scores: Array) -> list[Array]:
        """D times each of scores [C, C], 0 where hidden; rows are the tokens that read.

        Args:
          places: row and column index of every entry.
          *scores: one number for every pair of tokens.
        """
        visible, size = places[0] >= places[1], self.cut.chunk
        if self.cut.segments:
            apart = column(self._named("segment"), size) + row(self._named("-segment"), size)
            visible = visible & (apart == 0.0)
        if self.cut.decay:
            gap = column(self._named("total"), size) + row(self._named("-total"), size)
            # Where hidden the gap may be positive and overflow.
            weights = jnp.exp(jnp.where(visible, gap, 0.0))
            scores = tuple(x * weights for x in scores)
        return [jnp.where(visible, x, 0.0) for x in scores]

    def _named(self, name: str):
        return self.ref.at[self.cut.names.index(name)]
