"""Arrays that keep the sharding of others: inside shard_map and on Explicit meshes."""

import jax
from jax import lax

from memformer.core.types import Array

__all__ = ["vary_like"]


def vary_like(x: Array, *others: Array | None) -> Array:
    """Marks `x` as varying over the mesh axes that any of `others` varies over.

    Inside shard_map the first carry of a scan must vary over the same axes as the later ones; elsewhere this does
    nothing.
    """
    axes = frozenset().union(*(_varying(o) for o in others if o is not None))
    missing = tuple(sorted(axes - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Array) -> frozenset:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
