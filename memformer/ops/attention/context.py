"""Attention and DeltaFormer with time divided over devices: one exchange of time for heads, and one back.

An all-to-all gives every device all of time for 1/n of the rows (examples x key heads). The implementation runs there
unchanged, kernels, masks and caches included, and a second all-to-all gives every device its own tokens of the output.
Causal work is balanced by itself, DeltaFormer's u needs no order among devices, and nothing is gathered.

Bytes that a device sends per layer, with t = T / n tokens and E bytes per number: (n - 1) / n t E (H (K + V) +
G (K + V)). A ring sends its keys and values n - 1 times, (n - 1) t E G (K + V), and leaves causal work unbalanced; it
sends less only where H > n G. Passing DeltaFormer's u from shard to shard sends as much as the ring, and waits.

Source: arXiv 2309.14509 (DeepSpeed Ulysses).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memformer.core.calls import AttentionCall
from memformer.core.context import TimeShards, time_shards
from memformer.core.decay import CumulativeDecay
from memformer.core.numerics import repeat_heads
from memformer.core.types import Array
from memformer.pallas.sharding import dividing_axes, key_head_repeats

__all__ = ["run"]


def run(implementation: Callable[[AttentionCall], Any], call: AttentionCall) -> Any:
    """Runs an implementation of an attention op; where time lies on several devices, each runs some of the heads.

    Args:
      implementation: returns an output [B, T, H, V], or that and u [B, T, G, V].
      call: of all tokens.
    """
    shards = time_shards(call.q.shape[1])
    if shards is None:
        return implementation(call)
    groups = call.k.shape[2]
    call = _repeat_groups(call, key_head_repeats(groups, call.q.shape[2]))
    batch, heads = dividing_axes(call.q.shape[0], call.k.shape[2])
    tokens = _tokens(call)
    specs = (
        dict.fromkeys(tokens, shards.spec(batch, heads)),
        jax.tree.map(lambda x: PartitionSpec(batch if x.shape[0] > 1 else None), call.mask),
        jax.tree.map(lambda x: PartitionSpec(*(batch, None, heads)[: x.ndim]), call.cache),
        None if call.sinks is None else PartitionSpec(heads),
    )

    def local(tokens, mask, cache, sinks):
        local_call = dataclasses.replace(call, **tokens, mask=mask, cache=cache, sinks=sinks)
        return _exchange(implementation, shards, local_call)

    divided = shards.run(local, (*(batch or ()), *(heads or ())), specs, shards.spec(batch, heads))
    results = divided(tokens, call.mask, call.cache, call.sinks)
    if isinstance(results, tuple):
        output, u = results
        return output, u[:, :, :: u.shape[2] // groups]
    return results


def _tokens(call: AttentionCall) -> dict[str, Any]:
    """The fields of a call that hold something of each token."""
    fields = vars(call).items()
    return {name: x for name, x in fields if name != "sinks" and isinstance(x, jax.Array | CumulativeDecay)}


def _repeat_groups(call: AttentionCall, repeats: int) -> AttentionCall:
    """The call with every key head repeated, cache included; H must be a multiple of the new G."""
    if repeats == 1:
        return call
    heads, groups = call.q.shape[2], call.k.shape[2]

    def repeat(x):
        alone = x.ndim > 2 and x.shape[2] == groups and groups != heads
        return repeat_heads(x, repeats) if alone else x

    arrays: dict[str, Any] = {name: jax.tree.map(repeat, x) for name, x in _tokens(call).items()}
    return dataclasses.replace(call, **arrays, cache=jax.tree.map(repeat, call.cache))


class _HeadRows(NamedTuple):
    """Rows (examples x key heads) of a device before the exchange, and how many it has after it.

    Attributes:
      batch: examples.
      groups: key heads.
      kept: rows after the exchange; the last device's may be padding.
      shards: of time.
    """

    batch: int
    groups: int
    kept: int
    shards: TimeShards

    def gather_time(self, x: Array) -> Array:
        """[B, t, G R, ...] to [rows, T, R, ...], this device's rows."""
        return lax.all_to_all(self._split(x), self.shards.names, 0, 1, tiled=True)

    def gather_heads(self, x: Array) -> Array:
        """The inverse of `gather_time`."""
        x = lax.all_to_all(x, self.shards.names, 1, 0, tiled=True)[: self.batch * self.groups]
        x = jnp.moveaxis(x.reshape(self.batch, self.groups, *x.shape[1:]), 1, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def take(self, x: Array) -> Array:
        """This device's rows of an array that every device has whole: [B, S, G, ...], [B, S], or of one row for all."""
        if x.ndim > 2:
            x = self.shards.vary(self._split(x))
            return lax.dynamic_slice_in_dim(x, self.shards.rank() * jnp.int32(self.kept), self.kept, axis=0)
        if x.ndim < 2 or x.shape[0] != self.batch:
            return x
        row = self.shards.rank() * jnp.int32(self.kept) + jnp.arange(self.kept, dtype=jnp.int32)
        return jnp.take(self.shards.vary(x), jnp.minimum(row // self.groups, self.batch - 1), axis=0)

    def _split(self, x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.groups, -1, *x.shape[3:]), 2, 1)
        x = x.reshape(self.batch * self.groups, *x.shape[2:])
        missing = self.kept * self.shards.devices - x.shape[0]
        return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def _exchange(implementation, shards: TimeShards, call: AttentionCall) -> Any:
    """The call on this device's rows of all of time; results on its own tokens of all rows."""
    batch, groups = call.k.shape[0], call.k.shape[2]
    repeats = _row_repeats(batch * groups, call.q.shape[2] // groups, shards.devices)
    call = _repeat_groups(call, repeats)
    rows = _HeadRows(batch, groups * repeats, -(-batch * groups * repeats // shards.devices), shards)
    arrays: dict[str, Any] = {name: jax.tree.map(rows.gather_time, x) for name, x in _tokens(call).items()}
    mask, cache = jax.tree.map(rows.take, (call.mask, call.cache))
    sinks = call.sinks
    if sinks is not None:
        sinks = rows.take(jnp.broadcast_to(sinks[None, None], (batch, 1, *sinks.shape)))[:, 0]
    results = implementation(dataclasses.replace(call, **arrays, mask=mask, cache=cache, sinks=sinks))
    output, u = results if isinstance(results, tuple) else (results, None)
    # The op rounds the output to this dtype anyway.
    output = rows.gather_heads(output.astype(call.v.dtype))
    return output if u is None else (output, rows.gather_heads(u)[:, :, ::repeats])


def _row_repeats(rows: int, most: int, devices: int) -> int:
    """Repeats of each key head with which the devices share the rows out evenly; 1 where none do.

    Args:
      rows: examples x key heads.
      most: query heads per key head.
      devices: n.
    """
    repeats = devices // math.gcd(rows, devices)
    return repeats if most % repeats == 0 else 1
