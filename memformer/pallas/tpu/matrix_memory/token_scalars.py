"""What is one number a token and head: strength of the write, decay, segments.

It is one float32 array [B, H, names, N, C], names in the order of `Cut.names`, and enters a kernel as
[B, H / P, N, names * P, C]; a transpose in the kernel makes columns of the rows.

    beta     strength of the write
    write    beta, times how a write reaches the state that leaves the chunk
    enter    how a token sees the state that enters the chunk; the last token's is what the chunk keeps of it
    total    log decay since the start of the chunk
    segment  index of the token's segment
"""

import jax.numpy as jnp

from memformer.core.segments import pad_time
from memformer.core.types import Array
from memformer.pallas.tpu.common import Cut, iotas

__all__ = ["TokenGradients", "Tokens", "pack", "token_rows", "unpack"]


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
    rows = {} if beta is None else {"beta": cut_time(beta)}
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
    rows |= {"enter": enter, "write": leave if beta is None else leave * rows["beta"]}
    # [B, N, C, H, names] to [B, H, names, N, C].
    stacked = jnp.stack([rows[name] for name in cut.names], axis=4)
    return (stacked.transpose(0, 3, 4, 1, 2),)


def pack(cut: Cut, rows: Array) -> Array:
    """[B, H, names, N, C] to the array of the kernel."""
    blocks = cut.heads // cut.block
    x = rows.reshape(cut.batch, blocks, cut.block, len(cut.names), cut.chunks, cut.chunk)
    return x.transpose(0, 1, 4, 3, 2, 5).reshape(cut.batch, blocks, cut.chunks, -1, cut.chunk)


def unpack(cut: Cut, packed: Array) -> Array:
    """The inverse of `pack`."""
    blocks = cut.heads // cut.block
    x = packed.reshape(cut.batch, blocks, cut.chunks, len(cut.names), cut.block, cut.chunk)
    return x.transpose(0, 1, 4, 3, 2, 5).reshape(cut.batch, cut.heads, len(cut.names), cut.chunks, cut.chunk)


class Tokens:
    """The rows of one program, read by name and head as a row [1, C] or a column [C, 1]."""

    def __init__(self, cut: Cut, refs):
        self.cut = cut
        if refs:
            self._rows = refs[0][0, 0, 0]
            self._columns = self._rows.T

    def row(self, name: str, head: int) -> Array:
        """[1, C]."""
        place = self.cut.row(name, head)
        return self._rows[place : place + 1, :]

    def column(self, name: str, head: int) -> Array:
        """[C, 1]."""
        place = self.cut.row(name, head)
        return self._columns[:, place : place + 1]

    def enter(self, head: int, x: Array) -> Array:
        """x [C, V], each token as it sees the state that enters."""
        return self.column("enter", head) * x.astype(jnp.float32) if self.cut.carries else x

    def write(self, head: int, x: Array) -> Array:
        """x [C, V], each token as it reaches the state that leaves."""
        return self.column("write", head) * x.astype(jnp.float32) if "write" in self.cut.names else x

    def keep(self, head: int, state: Array) -> Array:
        """What stays of the state [K, V] over the chunk."""
        return self.row("enter", head)[:, self.cut.chunk - 1 :] * state if self.cut.carries else state

    def weights(self, head: int) -> Array:
        """[C, C] decay from the token of a column to that of a row, 0 where that cannot be seen."""
        row, column = iotas((self.cut.chunk, self.cut.chunk))
        visible = row >= column
        if self.cut.segments:
            visible = visible & (self.column("segment", head) == self.row("segment", head))
        if not self.cut.decay:
            return jnp.where(visible, 1.0, 0.0)
        gap = self.column("total", head) - self.row("total", head)
        return jnp.where(visible, jnp.exp(gap), 0.0)


class TokenGradients:
    """Collects the gradients of the rows of one program."""

    def __init__(self, cut: Cut):
        self.cut = cut
        count = len(cut.names) * cut.block
        self._rows = jnp.zeros((count, cut.chunk), jnp.float32)
        self._columns = jnp.zeros((cut.chunk, count), jnp.float32)

    def add(self, name: str, head: int, piece: Array) -> None:
        """Adds a column [C, 1] of gradients; none where there is no such number."""
        if name not in self.cut.names:
            return
        _, column = iotas(self._columns.shape)
        self._columns += jnp.where(column == self.cut.row(name, head), piece, 0.0)

    def add_row(self, name: str, head: int, piece: Array) -> None:
        """Adds a row [1, C] of gradients."""
        row, _ = iotas(self._rows.shape)
        self._rows += jnp.where(row == self.cut.row(name, head), piece, 0.0)

    def add_carry(self, head: int, entered: Array, kept: Array) -> None:
        """Adds the gradients of `Tokens.enter` and `keep`, yet to be summed: [C, V], [K, V]."""
        self.add("enter", head, jnp.sum(entered, axis=1, keepdims=True))
        _, column = iotas((1, self.cut.chunk))
        kept = jnp.sum(jnp.sum(kept, axis=0, keepdims=True), axis=1, keepdims=True)
        self.add_row("enter", head, jnp.where(column == self.cut.chunk - 1, kept, 0.0))

    def store(self, refs) -> None:
        """Writes the sums."""
        if refs:
            refs[0][0, 0, 0] = self._rows + self._columns.T
