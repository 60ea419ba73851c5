"""Few tokens of attention over a cache of fixed capacity: settings, operands and results of the kernels of every chip.

Such a kernel reads the slots in use once, for all tokens and heads of a call. The rows of its tiles are queries, the
columns are slots. A row sees the slots of its segment from its first slot to its last one, so that a slot needs one
number, its segment, for all heads; a decay needs two for each of its heads.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import lax

from memformer.core.decay import CumulativeDecay
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Float, Int
from memformer.pallas.sharding import KernelAxes, kernel_axes

__all__ = ["MOST_SLOTS", "CacheConfig", "CacheRead", "CacheSums", "token_values"]

# float32 counts slots and segments.
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
      first_slot: [B, T], the first one, where there is a window, or None.
      similarities: with their scales.
      kinds: which of them each of the H / G heads of a key head reads with.
      decay: cumulative, of tokens [B, T, heads] and of slots [B, S, heads], or None; of H heads or of G.
      precision: of matrix products.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    used: Array
    key_segment: Int[Array, "B S"]
    query_segment: Int[Array, "B T"]
    last_slot: Int[Array, "B T"] | None
    first_slot: Int[Array, "B T"] | None
    similarities: tuple[Kernel, ...]
    kinds: tuple[int, ...]
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
      windowed: whether it sees the slots from one of its own.
      decays: decays per key head and slot: 0, 1, or one of each of its query heads.
      precision: of matrix products.
      axes: mesh axes of batch and heads.
    """

    similarities: tuple[Kernel, ...]
    rows: int
    causal: bool
    windowed: bool
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
            windowed=read.first_slot is not None,
            decays=0 if read.decay is None else read.decay[1].whole.shape[2] // groups,
            precision=read.precision,
            **fields,
        )

    @property
    def parts(self) -> int:
        """Bfloat16 arrays whose sum makes up weights and values: sums without a normaliser cancel."""
        return 1 if all(kernel.normalized for kernel in self.similarities) else 2


def token_values(read: CacheRead) -> dict[str, Int[Array, "B T"]]:
    """Slots that each token sees: those of its segment, from `first` on and before `stop`."""
    shape = read.q.shape[:2]
    values: dict[str, Any] = {"segment": read.query_segment}
    values["first"] = jnp.int32(0) if read.first_slot is None else read.first_slot
    values["stop"] = jnp.asarray(read.used, jnp.int32) if read.last_slot is None else read.last_slot + jnp.int32(1)
    return {name: jnp.broadcast_to(x, shape) for name, x in values.items()}
