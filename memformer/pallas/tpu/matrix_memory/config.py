"""Static configuration of a call of a matrix memory on TPU.

A program of the grid (batch row, block of heads, chunk) computes P value heads of one chunk of C tokens. R = H / G
value heads share a query and key head, so that a program reads max(1, P / R) of those.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.types import Array
from memformer.pallas.checks import check_chunk_size
from memformer.pallas.config import BaseScanConfig
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.products import PASSES, exact_passes, product

__all__ = ["CHUNKS", "ScanConfig", "plan_call"]

# Powers of two, for the ladder of the inverse; 16 rows of bfloat16 fill a register.
CHUNKS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class ScanConfig(BaseScanConfig):
    """Sizes of a call. A block of value columns counts as a head, see `plan_call`.

    Attributes:
      max_heads: value heads per program, at most.
      remat: what is saved for the backward pass, see `Tuning`.
      passes: MXU passes per product.
      interleaved, stacked: see `Tuning`.
      erase: whether there is an erase vector other than k.
      channels: whether each key channel has a log decay of its own; `decay` is then False.
    """

    max_heads: int
    remat: str
    passes: int
    interleaved: int
    stacked: str | None
    erase: bool = False
    channels: bool = False

    def local(self, q: Array, v: Array) -> "ScanConfig":
        """The configuration of one device's shard: q [B, G, T, K], v [B, H, T, V]."""
        return dataclasses.replace(self, batch=v.shape[0], heads=v.shape[1], groups=q.shape[1])

    def exact(self, a, b, contract: str) -> Array:
        """The `product` of operands that cancel when keys repeat."""
        return product(a, b, contract, exact_passes(self.passes), self.stacked)

    @property
    def states_dtype(self) -> Any:
        """Dtype of the states saved for the backward pass: its products round them to bfloat16 in one pass."""
        return jnp.bfloat16 if self.passes == 1 else jnp.float32

    @property
    def program_heads(self) -> int:
        """P: value heads per program, whole groups or an even fraction of one."""
        divisors = (p for p in range(self.max_heads, 0, -1) if self.heads % p == 0)
        return next(p for p in divisors if p % self.repeat == 0 or self.repeat % p == 0)

    @property
    def program_keys(self) -> int:
        """Query and key heads per program."""
        return max(1, self.program_heads // self.repeat)

    @property
    def heads_per_key(self) -> int:
        """Value heads of a program that share a query and key head."""
        return self.program_heads // self.program_keys

    @property
    def head_pairs(self) -> list[tuple[int, ...]]:
        """The heads of a program in pairs, the last alone where they are odd."""
        count = self.program_heads
        return [tuple(range(h, min(h + 2, count))) for h in range(0, count, 2)]

    @property
    def keys(self) -> int:
        """Number of arrays [B, G, T, K]: q, k and, with an erase vector, w."""
        return 3 if self.erase else 2

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the token scalars of this call, in the order of their array; see token_scalars.py."""
        kinds: tuple[tuple[str, bool], ...] = (("beta", self.beta), ("alpha", self.beta and self.channels))
        kinds += (("write", (self.beta and not self.channels) or self.carries),)
        kinds += (("decay_in", self.carries), ("whole", self.decay), ("fraction", self.decay))
        kinds += (("segment", self.segments),)
        return tuple(name for name, present in kinds if present)

    def scalar_row(self, name: str, head: int) -> int:
        """The row of this scalar of this head in a program's block of scalars."""
        return self.scalars.index(name) * self.program_heads + head


def plan_call(call: MatrixCall, sizes: tuning.Tuning | None = None) -> ScanConfig:
    """Checks that the kernels serve this call, and chooses chunk and heads per program.

    Wide values are split into blocks of columns; each block then is a head that shares its query and key.

    Args:
      call: one write per token.
      sizes: in place of the table's.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    kind = check_tpu(call.op, call.q, call.v)
    check_chunk_size(call.op, call.chunk_size, CHUNKS)
    length, key, value = call.q.shape[1], call.q.shape[3], call.v.shape[3]
    kernel = "channel_" * call.decay_per_channel + ("linear_attention" if call.beta is None else "delta_rule")
    sizes = sizes or tuning.choose(kind, kernel, length, key, value, call.q.dtype.itemsize)
    blocks = value // sizes.values if value % sizes.values == 0 else 1
    return ScanConfig.of(
        call,
        call.chunk_size or sizes.chunk,
        heads=call.v.shape[2] * blocks,
        value=value // blocks,
        max_heads=sizes.heads,
        remat=sizes.remat,
        passes=PASSES[call.precision],
        interleaved=sizes.interleaved,
        stacked=sizes.stacked,
        decay=call.decay is not None and not call.decay_per_channel,
        erase=call.w is not None,
        channels=call.decay_per_channel,
    )
