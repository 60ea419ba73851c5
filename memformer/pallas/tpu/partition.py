"""Calls that every device can make for its own batch rows and heads.

A Pallas call is opaque to the partitioner and to vmap. All arrays of ours have batch first and heads
second and no row or head knows of another, so: the partitioner is told to split those two axes and to
keep the rest whole, and vmap folds its axis into the batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from memformer.core.types import Array
from memformer.pallas.tpu.common import interpreting

__all__ = ["Axes", "split_batch_and_heads"]

# For every array: rank, and whether axis 1 has the G heads of queries and keys.
Axes = tuple[tuple[int, bool], ...]


def split_batch_and_heads(
    function: Callable[..., Sequence[Array]], static: tuple[Any, ...], repeat: int, results: Axes
) -> Callable[..., Sequence[Array]]:
    """`function(*static, *arrays)`, made for sharded and for mapped arrays.

    Args:
      function: takes arrays [B, H, ...], the first two [B, G, ...], of any B and as many heads as a device holds.
      static: its first arguments, hashable.
      repeat: H / G.
      results: rank of every result, and whether its heads are G.
    """

    @custom_vmap
    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if interpreting() or (not mesh.empty and mesh.size == 1):
            # The interpreter's effects are more than the partitioner's calls can carry; and the partitioner wants
            # devices, where a mesh of one may stand for a machine that is not here.
            return tuple(function(*static, *arrays))
        operands = tuple((x.ndim, i < 2) for i, x in enumerate(arrays))
        return _partitioned(function, static, operands, results, repeat, *arrays)

    @call.def_vmap
    def _(size, batched, *arrays):
        wide = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = call(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return call


@functools.partial(custom_partitioning, static_argnums=(0, 1, 2, 3, 4))
def _partitioned(function, static, operands, results, repeat, *arrays):
    del operands, results, repeat
    return tuple(function(*static, *arrays))


def _partition(function, static, operands, results, repeat, mesh, arguments, result):
    # The first operand has the few heads: what splits them splits the many alike.
    first = (*arguments[0].sharding.spec, None, None)[:2]

    def shardings(axes):
        return tuple(NamedSharding(mesh, PartitionSpec(*first, *(None,) * (rank - 2))) for rank, _ in axes)

    def local(*arrays):
        return tuple(function(*static, *arrays))

    return mesh, local, shardings(results), shardings(operands)


def _rule(function, static, operands, results, repeat, mesh, operand_types, result_types):
    """The Shardy rule: b and g are shared by all arrays, every other axis stays whole."""
    # Factors in the order in which the rule names them, as Shardy wants.
    whole: list[str] = []

    def axes(rank, few):
        if not few and repeat > 1 and "r" not in whole:
            whole.append("r")
        rest = [f"w{len(whole) + i}" for i in range(rank - 2)]
        whole.extend(rest)
        heads = "g" if few or repeat == 1 else "(g r)"
        return " ".join(("b", heads, *rest))

    left = ", ".join(axes(*x) for x in operands)
    right = ", ".join(axes(*x) for x in results)
    sizes = {"r": repeat} if repeat > 1 else {}
    return f"{left} -> {right}", {"need_replication_factors": tuple(whole), **sizes}


_partitioned.def_partition(_partition, sharding_rule=_rule)
