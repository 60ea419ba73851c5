"""Few tokens of attention over a cache of fixed capacity: settings, operands and results of the kernels of every chip.

Such a kernel reads the slots in use once, for all tokens and heads of a call. The rows of its tiles are queries, the
columns are slots; which pairs count, and their decay, follows from scalars of both, all of them float32.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import lax

from memformer.core.decay import CumulativeDecay
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Float, Int
from memformer.pallas.pair_decay import decay_digits
from memformer.pallas.sharding import KernelAxes, kernel_axes

__all__ = ["DECAY", "MOST_SLOTS", "CacheConfig", "CacheRead", "CacheSums", "column_values", "row_values"]

# Scalars of a decay: its digits (pallas/pair_decay.py) and its fraction.
DECAY = ("decay_high", "decay_low", "decay_fraction")

# float32 counts slots, segments and ranks.
MOST_SLOTS = 2**24


class CacheRead(NamedTuple):
    """Queries and the cache that they read: the slots of a cache of fixed capacity.

    Attributes:
      q: [B, T, H, K].
      k, v: [B, S, G, K] and [B, S, G, V].
      used: slots in use; the others are not seen.
      key_segment: [B, S], of the slots.
      query_segment: [B, T]; a query sees slots of its segment.
      last_slot: [B, T], the last slot that a query sees, or None where all slots in use precede all queries.
      similarities: with their scales.
      kinds: which of them each of the H / G heads of a key head reads with.
      window: how many tokens back a query sees, itself included, or None.
      key_rank, query_rank: [B, S] and [B, T], where there is a window.
      decay: cumulative, of queries [B, T, H] and of slots [B, S, H] or [B, S, G], or None.
      precision: of matrix products.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    used: Array
    key_segment: Int[Array, "B S"]
    query_segment: Int[Array, "B T"]
    last_slot: Int[Array, "B T"] | None
    similarities: tuple[Kernel, ...]
    kinds: tuple[int, ...]
    window: int | None
    key_rank: Int[Array, "B S"] | None
    query_rank: Int[Array, "B T"] | None
    decay: tuple[CumulativeDecay, CumulativeDecay] | None
    precision: lax.Precision


class CacheSums(NamedTuple):
    """Sums that queries read from a cache, in float32; `value` is not divided by the sum of a softmax.

    Attributes:
      top: [B, T, H], the largest logit of a softmax; a large negative number where nothing is seen.
      total: [B, T, H], the sum of the exponentials of logits less `top`.
      value: [B, T, H, V], the weighted sum of values.
    """

    top: Float[Array, "B T H"]
    total: Float[Array, "B T H"]
    value: Float[Array, "B T H V"]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Static settings of a call.

    Attributes:
      similarities: of the rows, by their kind.
      rows: queries of one key head, T H / G.
      causal: whether a row sees the slots up to one of its own, not all.
      window: how many tokens back it sees, or None.
      decays: decays per key head and slot: 0, 1, or one of each of its query heads.
      precision: of matrix products.
      axes: mesh axes of batch and heads.
    """

    similarities: tuple[Kernel, ...]
    rows: int
    causal: bool
    window: int | None
    decays: int
    precision: lax.Precision
    axes: KernelAxes = dataclasses.field(default_factory=kernel_axes, kw_only=True)

    @classmethod
    def of(cls, read: CacheRead, **fields: Any) -> Self:
        """The settings of a read."""
        groups = read.k.shape[2]
        return cls(
            similarities=read.similarities,
            rows=read.q.shape[1] * read.q.shape[2] // groups,
            causal=read.last_slot is not None,
            window=read.window,
            decays=0 if read.decay is None else read.decay[1].whole.shape[2] // groups,
            precision=read.precision,
            **fields,
        )

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Scalars of rows and slots that say what a row sees."""
        return ("segment",) + ("slot",) * self.causal + ("rank",) * (self.window is not None)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Scalars of the rows."""
        names = self.mask_names + (DECAY if self.decays else ())
        return names + ("kind",) * (len(self.similarities) > 1) + ("head",) * (self.decays > 1)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Scalars of the slots; a decay has the number of its query head behind its name."""
        return self.mask_names + tuple(f"{name}{i}" for i in range(self.decays) for name in DECAY)

    @property
    def parts(self) -> int:
        """Bfloat16 arrays whose sum makes up weights and values: sums without a normaliser cancel."""
        return 1 if all(kernel.normalized for kernel in self.similarities) else 2


def row_values(config: CacheConfig, read: CacheRead) -> list[Float[Array, "B T H"]]:
    """The scalars of the rows, as `row_names` orders them."""
    groups, shape = read.k.shape[2], read.q.shape[:3]
    values: dict[str, Any] = {"segment": read.query_segment, "slot": read.last_slot, "rank": read.query_rank}
    values = {name: x[..., None] for name, x in values.items() if x is not None}
    place = jnp.arange(shape[2], dtype=jnp.int32) % (shape[2] // groups)
    values |= {"head": place, "kind": jnp.asarray(read.kinds * groups, jnp.int32)}
    if read.decay is not None:
        values |= dict(zip(DECAY, decay_digits(read.decay[0]), strict=True))
    return [jnp.broadcast_to(values[name].astype(jnp.float32), shape) for name in config.row_names]


def column_values(config: CacheConfig, read: CacheRead) -> list[Float[Array, "B S G"]]:
    """The scalars of the slots, as `column_names` orders them."""
    values: dict[str, Any] = {"segment": read.key_segment, "rank": read.key_rank}
    values = {name: x[..., None] for name, x in values.items() if x is not None}
    values["slot"] = jnp.arange(read.k.shape[1], dtype=jnp.int32)[:, None]
    if read.decay is not None:
        for name, x in zip(DECAY, decay_digits(read.decay[1]), strict=True):
            values |= {f"{name}{i}": x[:, :, i :: config.decays] for i in range(config.decays)}
    return [jnp.broadcast_to(values[name].astype(jnp.float32), read.k.shape[:3]) for name in config.column_names]
