"""Decay between the tokens of a pair, in the kernels of attention: what the chips share.

A cumulative decay (core/decay.py) is a whole number and a fraction. Kernels read both as float32, the whole number as
two digits to the base RADIX. Each block of tokens has an anchor, the whole number at one of its ends: the decay of a
pair is that from the row to the anchor of the columns plus that from the anchor to the column, two numbers of the same
sign, so that only adding them is done per pair. Within the block of the rows both parts are subtracted per pair. So
they are in all blocks of a call with a cache per document, whose decays add up from 0 in each: an anchor can be far
from the tokens of another document, and the sum of a whole number and a fraction then loses the fraction.

decay_high, decay_low        digits of the whole part
decay_fraction               of the same token
anchor_high, anchor_low      digits of the anchor of the token's block
decay_whole                  whole part less the anchor
decay_total                  cumulative decay less the anchor, to base 2
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.decay import FORGOTTEN_PAIR, CumulativeDecay
from memformer.core.types import Array

__all__ = [
    "HIDDEN",
    "LOG2E",
    "RADIX",
    "QueryKeyDecay",
    "block_scalars",
    "decay_digits",
    "fraction_gradient",
    "join_decay",
    "row_scalars",
]

RADIX = 4096

LOG2E = math.log2(math.e)

# Pairs with no more than this between them, to base 2, are masked. -inf counts as FORGOTTEN_PAIR; 1 is for rounding.
HIDDEN = (FORGOTTEN_PAIR + 1) * LOG2E


class QueryKeyDecay(NamedTuple):
    """Cumulative log decays of queries [B, H, T] and of slots [B, H, S] in whole blocks, or their gradients."""

    query: CumulativeDecay
    key: CumulativeDecay

    def part(self, rows: slice, slots: slice) -> "QueryKeyDecay":
        """Of some queries and slots."""
        return QueryKeyDecay(*(x[:, :, at] for x, at in zip(self, (rows, slots), strict=True)))


def join_decay(call: AttentionCall, size: int, multiple: int | None = None) -> QueryKeyDecay | None:
    """The decays of a call in whole blocks; padding repeats the last token, so that no pair grows.

    Args:
      call: of an attention op.
      size: of a block; the cache is padded to a multiple of it.
      multiple: what the tokens are padded to a multiple of; None is `size`.
    """
    if call.decay is None:
        return None

    def pad(x, multiple):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)), mode="edge")
        return jnp.swapaxes(x, 1, 2)

    query = key = CumulativeDecay(*(pad(x, multiple or size) for x in call.decay))
    if call.cache is not None:
        held = (call.cache.decay_whole, call.cache.decay_fraction)
        pairs = ((pad(x, size), new) for x, new in zip(held, query, strict=True))
        key = CumulativeDecay(*(jnp.concatenate([x, new.astype(x.dtype)], axis=2) for x, new in pairs))
    return QueryKeyDecay(query, key)


def decay_digits(decay: CumulativeDecay) -> tuple[Array, Array, Array]:
    """The whole part as two digits, and the fraction."""
    return (*_digits(decay.whole), decay.fraction)


def row_scalars(decay: CumulativeDecay) -> dict[str, Array]:
    """The scalars of rows, [B, H, T], by name."""
    high, low = _digits(decay.whole)
    return {"decay_high": high, "decay_low": low, "decay_fraction": decay.fraction}


def block_scalars(decay: CumulativeDecay, size: int, anchor: Callable[..., Array] = jnp.min) -> dict[str, Array]:
    """The scalars of columns, [B, H, S], by name.

    Args:
      decay: of the tokens, [B, H, S], S a multiple of `size`.
      size: of a block.
      anchor: jnp.min where rows come after the columns, jnp.max where they come before.
    """
    blocks = decay.whole.reshape(*decay.whole.shape[:2], -1, size)
    anchors = jnp.broadcast_to(anchor(blocks, axis=-1, keepdims=True), blocks.shape).reshape(decay.whole.shape)
    whole = (decay.whole - anchors).astype(jnp.float32)
    high, low = _digits(anchors)
    scalars = {"anchor_high": high, "anchor_low": low, "decay_whole": whole, "decay_fraction": decay.fraction}
    return scalars | {"decay_total": (whole + decay.fraction) * LOG2E}


def _digits(whole: Array) -> tuple[Array, Array]:
    high = jnp.floor_divide(whole, RADIX)
    return high, whole - high * RADIX


def fraction_gradient(query: Array, key: Array) -> QueryKeyDecay:
    """The gradient of the decays' fractions; whole parts have none."""
    # None is what JAX takes as the gradient of integers.
    none: Any = None
    return QueryKeyDecay(CumulativeDecay(none, query), CumulativeDecay(none, key))
