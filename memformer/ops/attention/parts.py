"""Heads in parts that are read one after another, so that tiles of scores stay in the caches of a CPU."""

import os

import jax
import jax.numpy as jnp

from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Float
from memformer.ops.attention.tiles import TileMask
from memformer.pallas.platform import chip

__all__ = ["head_parts", "stack_parts", "unstack_parts"]


def head_parts(mask: TileMask, batch: int, groups: int) -> tuple[int, int]:
    """Into how many parts the heads are divided, which are read one after another, and the examples of one part.

    On a CPU a part is one head per core, so that its tiles stay in the cache of a core: tiles of all heads at once
    would pass through memory in each step. Several devices share the heads out, and a loop over heads would gather
    them. Examples are heads too where all have the same mask.

    Args:
      mask: of the call.
      batch, groups: B and G.
    """
    if not _one_cpu() or is_symbolic(batch) or mask.query_decay is not None:
        return 1, batch
    examples = 1 if all(x is None for x in mask.mask) else batch
    heads = groups * (batch // examples)
    size = min(max(1, _cores() // examples), heads)
    return heads // next(count for count in range(size, 0, -1) if heads % count == 0), examples


def stack_parts(x: Float[Array, "N B G *rest"], parts: int, examples: int) -> Float[Array, "PN b g *rest"]:
    """The chunks of each part of the heads, part after part."""
    if parts == 1:
        return x
    chunks, _, _, *rest = x.shape
    return jnp.moveaxis(x.reshape(chunks, examples, parts, -1, *rest), 2, 0).reshape(
        parts * chunks, examples, -1, *rest
    )


def unstack_parts(x: Float[Array, "PN b g *rest"], parts: int, batch: int) -> Float[Array, "N B G *rest"]:
    """The inverse of `stack_parts`."""
    if parts == 1:
        return x
    chunks, rest = x.shape[0] // parts, x.shape[3:]
    x = jnp.moveaxis(x.reshape(parts, chunks, *x.shape[1:]), 0, 2)
    return x.reshape(chunks, batch, -1, *rest)


def _one_cpu() -> bool:
    """Whether this trace is for one CPU device."""
    return chip() == "cpu" and jax.device_count() == 1


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
