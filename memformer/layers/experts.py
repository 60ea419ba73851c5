"""SwiGLU experts of which each token uses a few: only the chosen ones are computed, also where devices share them out.

The pairs of a token and one of its experts are sorted by expert and cut into blocks of one expert each. A loop runs
over the blocks that there are, so that its length follows the routing, and multiplies the rows of a block by the
weights of its expert. Nothing is dropped, and beside the tokens only one block of hidden units is kept.

Under a mesh every device has E / n of the experts (the axis "expert" of the library's own meshes). The tokens of the n
devices are gathered, each device computes the pairs of its own experts, and the results are summed and scattered:
(n - 1) N D numbers arrive per device either way, for N tokens per device. An exchange of the pairs alone would move
N k D (n - 1) / n, less only where k < n, in buffers for the worst case of all pairs on one device; XLA's
ragged-all-to-all, which needs no such buffers, does not exist on CPUs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memformer.core.context import time_shards
from memformer.core.numerics import accumulation_dtype
from memformer.core.sharding import letter_axes, mesh_axes, vary_like
from memformer.core.types import Array, Float, Int
from memformer.pallas.sharding import axis_names, dividing, dividing_axes

__all__ = ["apply_experts"]

# Rows of a block: a quarter of what an expert gets when all get the same, within these bounds.
ROWS = (16, 512)


def apply_experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weight: Float[Array, "B T k"],
    gate: Float[Array, "experts D mlp"],
    up: Float[Array, "experts D mlp"],
    down: Float[Array, "experts mlp D"],
) -> Float[Array, "B T D"]:
    """Computes y = sum_i weight_i SwiGLU_{chosen_i}(x) for every token, with the chosen experts alone.

    It has one derivative, in reverse mode.

    Args:
      x: tokens.
      chosen: the k different experts of each token.
      weight: their weights.
      gate: weights of the gates, by expert.
      up: of the first map.
      down: of the second map.

    Example:
      >>> x, ones = jnp.ones((1, 1, 2)), jnp.ones((3, 2, 2))
      >>> apply_experts(x, jnp.array([[[2]]]), jnp.ones((1, 1, 1)), ones, ones, jnp.arange(12.0).reshape(3, 2, 2)).shape
      (1, 1, 2)
    """
    axes = _expert_axes(x, gate)
    rows = _block_rows(chosen.size, gate.shape[0])
    local: Callable[..., Array] = functools.partial(_apply_local, axes, rows)
    if not axes.all:
        return local(x, chosen, weight, gate, up, down)
    if axes.exchanged:
        # Gathered tokens are n times as many: they are gathered again in the backward pass.
        local = jax.checkpoint(local)
    tokens = PartitionSpec(axes.batch, axes.time)
    first, second = PartitionSpec(axes.experts, None, axes.hidden), PartitionSpec(axes.experts, axes.hidden)
    in_specs = (tokens, tokens, tokens, first, first, second)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=tokens, axis_names=set(axes.all))
    return run(x, chosen, weight, gate, up, down)


class _ExpertAxes(NamedTuple):
    """The mesh axes over which each dimension is divided; None where none."""

    batch: tuple[str, ...] | None
    time: tuple[str, ...] | None
    experts: tuple[str, ...] | None
    hidden: tuple[str, ...] | None

    @property
    def all(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(name for part in self for name in part or ()))

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The axes of the experts whose devices have different tokens."""
        tokens = {*(self.batch or ()), *(self.time or ())}
        return tuple(name for name in self.experts or () if name in tokens)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes whose devices have the same tokens and add parts of the result."""
        return tuple(name for name in (*(self.experts or ()), *(self.hidden or ())) if name not in self.exchanged)


def _expert_axes(x: Array, gate: Array) -> _ExpertAxes:
    batch, _ = dividing_axes(x.shape[0], 1)
    shards = time_shards(x.shape[1])
    explicit = letter_axes() is not None
    experts = dividing(axis_names(mesh_axes("experts")) if explicit else ("expert",), gate.shape[0])
    names = axis_names(mesh_axes("mlp")) if explicit else ("tensor",)
    hidden = dividing([name for name in names if name not in (experts or ())], gate.shape[2])
    return _ExpertAxes(batch, None if shards is None else shards.names, experts, hidden)


def _block_rows(pairs: int, experts: int) -> int:
    least, most = ROWS
    rows = least
    while rows < most and 8 * rows * experts <= pairs:
        rows *= 2
    return rows


def _apply_local(axes: _ExpertAxes, rows: int, x, chosen, weight, gate, up, down) -> Array:
    """The result for this device's tokens; with its experts, and the help of the devices that have the others."""
    tokens: Any = (x.reshape(-1, x.shape[-1]), *(a.reshape(-1, a.shape[-1]) for a in (chosen, weight)))
    if axes.exchanged:
        tokens = jax.tree.map(lambda a: lax.all_gather(a, axes.exchanged, axis=0, tiled=True), tokens)
    if axes.experts:
        place = lax.axis_index(axes.experts) * jnp.int32(gate.shape[0])
        tokens = (tokens[0], tokens[1] - place.astype(chosen.dtype), tokens[2])
    arrays = (*tokens, gate, up, down)
    y = _grouped(rows, *(vary_like(a, *arrays) for a in arrays)).astype(x.dtype)
    if axes.exchanged:
        y = lax.psum_scatter(y, axes.exchanged, scatter_dimension=0, tiled=True)
    return (lax.psum(y, axes.summed) if axes.summed else y).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _ExpertBlocks:
    """Pairs of tokens and experts, in blocks of one expert.

    Attributes:
      order: numbers of the pairs, by expert.
      ends: for each expert, the end of its pairs in `order`.
      last: for each expert, the number of blocks up to its last one.
      rows: of a block.
      active: experts per token.
    """

    order: Array
    ends: Array
    last: Array
    rows: int
    active: int

    @property
    def count(self) -> Array:
        """Number of blocks."""
        return self.last[-1]

    def __getitem__(self, block: Array) -> tuple[Array, Array, Array, Array]:
        """The expert of a block, and of each of its rows the token, the pair, and whether there is one."""
        expert = jnp.sum(block >= self.last, dtype=jnp.int32)
        end = self.ends[expert]
        # Counted from the end, so that the last block is the one that is not full.
        place = self._start(expert) + (block - self._first(expert)) * self.rows
        place = place + jnp.arange(self.rows, dtype=jnp.int32)
        pair = jnp.take(self.order, place, mode="clip")
        return expert, pair // self.active, pair, (place < end)[:, None]

    def _start(self, expert: Array) -> Array:
        return jnp.where(expert > 0, self.ends[jnp.maximum(expert - 1, 0)], 0)

    def _first(self, expert: Array) -> Array:
        return jnp.where(expert > 0, self.last[jnp.maximum(expert - 1, 0)], 0)


def _blocks(chosen: Array, experts: int, rows: int) -> _ExpertBlocks:
    """Blocks of the pairs with one of the experts [0, E); other pairs are left out."""
    pairs = chosen.reshape(-1).astype(jnp.int32)
    pairs = jnp.where((pairs >= 0) & (pairs < experts), pairs, experts)
    order = jnp.argsort(pairs, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(pairs, length=experts + 1)[:experts].astype(jnp.int32)
    ends, last = (jnp.cumsum(n, dtype=jnp.int32) for n in (sizes, -(-sizes // rows)))
    return _ExpertBlocks(order, ends, last, rows, chosen.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(rows: int, x, chosen, weight, gate, up, down) -> Array:
    """The sum over the experts [0, E) that each token [N, D] has chosen, in the accumulation dtype."""
    blocks, wide = _blocks(chosen, gate.shape[0], rows), accumulation_dtype(x, gate)
    flat = weight.reshape(-1)

    def body(i, y):
        expert, token, pair, here = blocks[i]
        h, _, _ = _hidden(jnp.where(here, x[token], 0), gate[expert], up[expert])
        out = jnp.matmul(h, down[expert], preferred_element_type=wide) * flat[pair][:, None].astype(wide)
        return y.at[token].add(jnp.where(here, out, 0))

    return lax.fori_loop(0, blocks.count, body, vary_like(jnp.zeros(x.shape, wide), x))


def _hidden(x: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """silu(a) * b, a and b, for a = x W_g and b = x W_u."""
    a, b = jnp.matmul(x, gate), jnp.matmul(x, up)
    return jax.nn.silu(a) * b, a, b


def _grouped_forward(rows, *arrays):
    return _grouped(rows, *arrays), arrays


def _grouped_backward(rows, arrays, dy):
    x, chosen, weight, gate, up, down = arrays
    blocks, wide = _blocks(chosen, gate.shape[0], rows), accumulation_dtype(x, gate)
    flat = weight.reshape(-1)
    product = functools.partial(jnp.matmul, preferred_element_type=wide)

    def body(i, sums):
        expert, token, pair, here = blocks[i]
        taken = jnp.where(here, x[token], 0)
        h, a, b = _hidden(taken, gate[expert], up[expert])
        dy_rows = jnp.where(here, dy[token], 0).astype(x.dtype)
        factor = flat[pair][:, None].astype(wide)
        # Of the hidden units of a pair before its weight.
        dh = product(dy_rows, down[expert].T)
        d_weight = jnp.sum(h.astype(wide) * dh, axis=-1)
        _, pull = jax.vjp(lambda a, b: jax.nn.silu(a) * b, a, b)
        da, db = pull((dh * factor).astype(h.dtype))
        dx = product(da, gate[expert].T) + product(db, up[expert].T)
        weighted = (h.astype(wide) * factor).astype(h.dtype)
        parts: Sequence[Array] = (product(taken.T, da), product(taken.T, db), product(weighted.T, dy_rows))
        return (
            sums[0].at[token].add(jnp.where(here, dx, 0)),
            sums[1].at[pair].add(jnp.where(here[:, 0], d_weight, 0)),
            *(total.at[expert].add(part) for total, part in zip(sums[2:], parts, strict=True)),
        )

    zeros = tuple(vary_like(jnp.zeros(a.shape, wide), x) for a in (x, flat, gate, up, down))
    dx, d_weight, *others = lax.fori_loop(0, blocks.count, body, zeros)
    d_weight = d_weight.reshape(weight.shape).astype(weight.dtype)
    return dx.astype(x.dtype), None, d_weight, *(d.astype(p.dtype) for d, p in zip(others, arrays[3:], strict=True))


_grouped.defvjp(_grouped_forward, _grouped_backward)
