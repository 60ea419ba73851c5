"""Token scalars in the kernels: write strength, decay and segment per token and head.

One float32 array [B, H, names, N, C], names in the order of `ScanConfig.scalars`: those of pallas/token_scalars.py, and

    write    beta decay_out: how a token's write reaches the state that leaves the chunk
    alpha    beta where the call has no alpha: kernels with a decay per key channel, in which `write` is decay_out alone

A program reads a block [names * P, C] of it; a transpose in the kernel turns rows into columns.
"""

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array
from memformer.pallas import token_scalars
from memformer.pallas.tpu.matrix_memory.config import ScanConfig
from memformer.pallas.tpu.products import iotas

__all__ = ["ScalarGradients", "TokenScalars", "pack_scalars", "stack_scalars", "unpack_scalars"]


def stack_scalars(config: ScanConfig, call: MatrixCall) -> tuple[Array, ...]:
    """The array of the token scalars, or () where tokens have none."""
    if not config.scalars:
        return ()
    scalars = token_scalars.token_scalars(config, call, _running_sums)
    decay_out = scalars["decay_out"]
    scalars["write"] = decay_out * scalars["beta"] if config.beta and not config.channels else decay_out
    if "alpha" in config.scalars:
        scalars.setdefault("alpha", scalars["beta"])
    return (jnp.stack([scalars[name] for name in config.scalars], axis=2),)


def _running_sums(x: Array, axis: int) -> Array:
    """Sums along the last axis, as a product with a triangle of ones: exact to 24 bits, whole numbers without error.

    The compiler takes a tenth of the time for it that it takes for a scan.
    """
    triangle = jnp.triu(jnp.ones((x.shape[axis],) * 2, x.dtype))
    return jnp.matmul(x, triangle, precision=lax.Precision.HIGHEST)


def pack_scalars(config: ScanConfig, scalars: Array) -> Array:
    """[B, H, names, N, C] to the layout of the kernels, [B, H / P, N, names * P, C]."""
    blocks, names = config.heads // config.program_heads, len(config.scalars)
    x = scalars.reshape(config.batch, blocks, config.program_heads, names, config.chunks, config.chunk)
    return x.transpose(0, 1, 4, 3, 2, 5).reshape(config.batch, blocks, config.chunks, -1, config.chunk)


def unpack_scalars(config: ScanConfig, packed: Array) -> Array:
    """The inverse of `pack_scalars`."""
    blocks, names = config.heads // config.program_heads, len(config.scalars)
    x = packed.reshape(config.batch, blocks, config.chunks, names, config.program_heads, config.chunk)
    return x.transpose(0, 1, 4, 3, 2, 5).reshape(config.batch, config.heads, names, config.chunks, config.chunk)


class TokenScalars:
    """The token scalars of one program, inside a kernel.

    Args:
      config: sizes.
      refs: the reference to the program's block, or nothing where tokens have no scalars.
    """

    def __init__(self, config: ScanConfig, refs):
        self.config = config
        if refs:
            self._rows = refs[0][0, 0, 0]
            self._columns = self._rows.T

    def row(self, name: str, head: int) -> Array:
        """A scalar of one head as a row [1, C]."""
        place = self.config.scalar_row(name, head)
        return self._rows[place : place + 1, :]

    def column(self, name: str, head: int) -> Array:
        """A scalar of one head as a column [C, 1]."""
        place = self.config.scalar_row(name, head)
        return self._columns[:, place : place + 1]

    def decay_in(self, head: int, x: Array) -> Array:
        """Reads x [C, V] of the state that enters the chunk, each decayed up to its token."""
        return self.column("decay_in", head) * x.astype(jnp.float32) if self.config.carries else x

    def write(self, head: int, x: Array) -> Array:
        """Writes x [C, V], each with its strength and decayed until the end of the chunk."""
        return self.column("write", head) * x.astype(jnp.float32) if "write" in self.config.scalars else x

    def decay_in_transposed(self, head: int, x: Array) -> Array:
        """`decay_in` of x^T [V, C]."""
        return self.row("decay_in", head) * x.astype(jnp.float32) if self.config.carries else x

    def write_transposed(self, head: int, x: Array) -> Array:
        """`write` of x^T [V, C]."""
        return self.row("write", head) * x.astype(jnp.float32) if "write" in self.config.scalars else x

    def decay_state(self, head: int, state: Array) -> Array:
        """A state [K, V], decayed over the whole chunk."""
        return self.row("decay_in", head)[:, self.config.chunk - 1 :] * state if self.config.carries else state

    def same_segment(self, head: int, rows: slice = slice(None)) -> Array:
        """Rows of [C, C]: whether two tokens are of one segment; only where sequences are packed."""
        return self.column("segment", head)[rows] == self.row("segment", head)

    def decay_mask(self, head: int, rows: slice = slice(None)) -> Array:
        """Rows of D [C, C]: the decay from the token of a column to that of a row, 0 where masked."""
        top, end, _ = rows.indices(self.config.chunk)
        row, column = iotas((end - top, self.config.chunk))
        mask = row + top >= column
        if self.config.segments:
            mask = mask & self.same_segment(head, rows)
        if not self.config.decay:
            return jnp.where(mask, 1.0, 0.0)
        whole, fraction = (self.column(name, head)[rows] - self.row(name, head) for name in ("whole", "fraction"))
        return jnp.where(mask, jnp.exp(whole + fraction), 0.0)


class ScalarGradients:
    """Collects the gradients of the token scalars of one program.

    Rows are added up in VMEM: they would take registers until the last head is done.
    """

    def __init__(self, config: ScanConfig, refs):
        self.config, self._columns = config, None
        if refs:
            self._rows = refs[0].at[0, 0, 0]
            self._rows[...] = jnp.zeros(self._rows.shape, jnp.float32)

    def add_column(self, name: str, head: int, gradient: Array) -> None:
        """Adds a column [C, 1] to the gradient of a scalar; does nothing where the call has no such scalar."""
        if name not in self.config.scalars:
            return
        shape = self._rows.shape[::-1]
        if self._columns is None:
            self._columns = jnp.zeros(shape, jnp.float32)
        _, column = iotas(shape)
        self._columns += jnp.where(column == self.config.scalar_row(name, head), gradient, 0.0)

    def add_row(self, name: str, head: int, gradient: Array) -> None:
        """Adds a row [1, C] to the gradient of a scalar."""
        row = self.config.scalar_row(name, head)
        self._rows[row : row + 1, :] += gradient

    def add_decay(self, head: int, reads: Array, states: Array) -> None:
        """Adds the gradient of decay_in.

        Args:
          head: of the program.
          reads: [C, V], to be summed per token: gradients of reads from the state that enters, times these reads.
          states: [K, V], to be summed: the gradient of the state that leaves, times the state that enters.
        """
        self.add_column("decay_in", head, jnp.sum(reads, axis=1, keepdims=True))
        self.add_row("decay_in", head, self._in_last(states))

    def add_decay_transposed(self, head: int, reads: Array, states: Array) -> None:
        """`add_decay` of reads^T [V, C] and states^T [V, K]."""
        self.add_row("decay_in", head, jnp.sum(reads, axis=0, keepdims=True) + self._in_last(states))

    def _in_last(self, states: Array) -> Array:
        """The sum of a matrix as the gradient of the last token's scalar, [1, C]."""
        _, column = iotas((1, self.config.chunk))
        total = jnp.sum(jnp.sum(states, axis=0, keepdims=True), axis=1, keepdims=True)
        return jnp.where(column == self.config.chunk - 1, total, 0.0)

    def store(self) -> None:
        """Adds the columns to the rows."""
        if self._columns is not None:
            self._rows[...] += self._columns.T
