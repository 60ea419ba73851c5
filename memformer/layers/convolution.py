"""Short causal convolution on queries, keys and values, and the token before each."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from memformer.core.checks import check_size
from memformer.core.context import TimeShards, time_shards
from memformer.core.segments import Segments
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Bool, Float, Int
from memformer.layers.basic import Dtypes, named
from memformer.layers.sharding import auto_axes
from memformer.pallas.sharding import dividing_axes

__all__ = ["ShortConvolution", "shift_token"]


@jax.custom_vjp
def _permute(x: Float[Array, "B T C"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]) -> Array:
    """x[b, order[b, t]]; given `inverse`, the inverse permutation, the backward pass is a gather too."""
    return jnp.take_along_axis(x, order[:, :, None], axis=1, mode="promise_in_bounds")


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved, cotangent):
    order, inverse = saved
    return _permute(cotangent, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution followed by silu: y_t = silu(sum_{j < W} a_j x_{t-j} + b), where b is optional.

    Inputs before the first token of a segment are zero, and padding is skipped, so packed sequences give the same
    outputs as unpacked ones. The state holds the last W - 1 inputs of the last segment, [B, W-1, C].

    Args:
      channels: C, named "heads" for sharding.
      width: W, at least 1.
      bias: adds b (Mamba-2).
      dtypes: the dtype policy.
      rngs: random streams.

    Source: arXiv 2406.06484 section 3.4; arXiv 2312.00752.

    Example:
      >>> layer = ShortConvolution(3, 4, dtypes=Dtypes(), rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((2, 5, 3)))
      >>> y.shape, state.shape
      ((2, 5, 3), (2, 3, 3))
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False, dtypes: Dtypes, rngs: nnx.Rngs):
        width = check_size("convolution width", width)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=())
        self.weights = nnx.Param(named(init, None, "heads")(rngs.params(), (width, channels), dtypes.param))
        self.bias: Any = nnx.data(None)
        if bias:
            self.bias = nnx.Param(named(nnx.initializers.zeros, "heads")(rngs.params(), (channels,), dtypes.param))
        self.channels, self.width, self.dtypes = channels, width, dtypes

    def init_state(self, batch: int) -> Float[Array, "B W C"]:
        """The state before the first token: zeros."""
        return jnp.zeros((batch, self.width - 1, self.channels), self.dtypes.compute)

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T C"], *, segments: Segments | None = None, state: Array | None = None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
        """Returns (y, state)."""
        state = self.init_state(x.shape[0]) if state is None else state
        y, state = _sum_taps(self.weights[...].astype(x.dtype), x, segments, state)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None]
        return nnx.silu(y), state


def shift_token(
    x: Float[Array, "B T C"], segments: Segments | None, state: Float[Array, "B 1 C"]
) -> tuple[Float[Array, "B T C"], Float[Array, "B 1 C"]]:
    """The input of the token before, in the same segment, without padding; zero before the first token of a segment.

    A convolution of width 2 that reads the earlier input alone.

    Args:
      x: inputs.
      segments: of packed sequences.
      state: the input before the call, of the first segment.

    Returns:
      (the inputs before, the last input of the last segment).

    Example:
      >>> y, state = shift_token(jnp.arange(3.0).reshape(1, 3, 1), None, jnp.full((1, 1, 1), 7.0))
      >>> y[0, :, 0], state[0, :, 0]
      (Array([7., 0., 1.], dtype=float32), Array([2.], dtype=float32))
    """
    taps = jnp.asarray([[0], [1]], x.dtype)
    return _sum_taps(jnp.broadcast_to(taps, (2, x.shape[2])), x, segments, state)


def _sum_taps(weights: Array, x: Array, segments: Segments | None, state: Array) -> tuple[Array, Array]:
    """The sums over the last inputs by weights [W, C], and the state, on shards of time where time is sharded."""
    shards = time_shards(x.shape[1])
    if shards is None or weights.shape[0] == 1:
        return _convolve(weights, x, segments, state)
    batch, channels = dividing_axes(x.shape[0], x.shape[2])
    time, whole = shards.spec(batch, channels), PartitionSpec(batch, None, channels)
    local = functools.partial(_convolve_shard, shards)
    specs = PartitionSpec(None, channels), time, shards.spec(batch), whole
    others = (*(batch or ()), *(channels or ()))
    return shards.run(local, others, specs, (time, whole))(weights, x, segments, state)


def _convolve(weights: Array, x: Array, segments: Segments | None, state: Array) -> tuple[Array, Array]:
    """Output and state of a call, by its weights [W, C]."""
    if segments is None:
        y, history = _slide(weights, x, state, None)
        return y, history[:, x.shape[1] :]
    # Valid tokens move to the front in their order, so that the convolution meets no padding among them.
    order = jnp.argsort(~segments.valid, axis=1, stable=True)
    inverse = jnp.argsort(order, axis=1)
    index = jnp.take_along_axis(segments.index, order, axis=1)
    y, history = _slide(weights, _permute(x, order, inverse), state, index)
    return _permute(y, inverse, order), _last(history, index, segments)


def _slide(weights: Array, x: Array, state: Array, index: Array | None) -> tuple[Array, Array]:
    """Returns the sums over shifted copies, and [state, x] concatenated."""
    width, time = weights.shape[0], x.shape[1]
    history = jnp.concatenate([state, x], axis=1)
    # The state belongs to the first segment.
    place = None if index is None else jnp.pad(index, ((0, 0), (width - 1, 0)))
    y = x * weights[None, None, 0]
    for j in range(1, width):
        past = history[:, width - 1 - j : width - 1 - j + time]
        if place is not None and index is not None:
            same = jnp.equal(place[:, width - 1 - j : width - 1 - j + time], index)
            past = jnp.where(same[:, :, None], past, jnp.zeros_like(past))
        y = y + past * weights[None, None, j]
    return y, history


def _last(history: Array, index: Array, segments: Segments) -> Array:
    """The W - 1 inputs up to the last valid token, zero where they belong to an earlier segment."""
    size = history.shape[1] - index.shape[1]
    count = jnp.sum(segments.valid, axis=1, dtype=jnp.int32)
    take = count[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    place = jnp.pad(index, ((0, 0), (size, 0)))
    here = jnp.take_along_axis(place, take, axis=1) == segments.index[:, -1:]
    last = jnp.take_along_axis(history, take[:, :, None], axis=1)
    return jnp.where(here[:, :, None], last, jnp.zeros_like(last))


class _Tail(NamedTuple):
    """The last W - 1 inputs of a shard of time, and how many of them replace those of earlier shards."""

    inputs: Float[Array, "B W C"]
    filled: Int[Array, "B"]


def _convolve_shard(
    shards: TimeShards, weights: Array, x: Array, segments: Segments | None, state: Array
) -> tuple[Array, Array]:
    """`_convolve` on one shard of time, inside shard_map; the state is that before the whole call."""
    state = vary_like(shards.vary(state), x)
    continues = None
    if segments is not None:
        segments, continues = shards.local_segments(segments)
    start = _start_inputs(shards, x, segments, continues, state)
    if continues is not None:
        start = jnp.where(continues[:, None, None], start, jnp.zeros_like(start))
    y, after = _convolve(weights, x, segments, start)
    return y, shards.from_last(after)


def _start_inputs(
    shards: TimeShards, x: Array, segments: Segments | None, continues: Bool[Array, "B"] | None, state: Array
) -> Array:
    """The W - 1 inputs before this shard: of its neighbour, or from farther where that has fewer."""
    size, time = state.shape[1], x.shape[1]
    if segments is None and time >= size:
        return shards.first(state, shards.shift(x[:, time - size :]))
    empty = jnp.zeros_like(state)
    if segments is None or continues is None:
        inputs = jnp.concatenate([empty, x], axis=1)[:, time:]
        count = jnp.full(x.shape[0], min(time, size), jnp.int32)
    else:
        order = jnp.argsort(~segments.valid, axis=1, stable=True)
        index = jnp.take_along_axis(segments.index, order, axis=1)
        history = jnp.concatenate([empty, jnp.take_along_axis(x, order[:, :, None], axis=1)], axis=1)
        inputs = _last(history, index, segments)
        in_last = segments.valid & (segments.index == segments.index[:, -1:])
        count = jnp.minimum(jnp.sum(in_last, axis=1, dtype=jnp.int32), jnp.int32(size))
        # A segment that starts here leaves nothing of earlier shards.
        count = jnp.where(continues & (segments.index[:, -1] == 0), count, jnp.int32(size))
    tail = _Tail(inputs, vary_like(count, x))
    whole = _Tail(state, jnp.full_like(tail.filled, size))
    tail = shards.first(_join_tails(whole, tail), tail)
    return shards.earlier(_join_tails, tail, whole).inputs


def _join_tails(earlier: _Tail, later: _Tail) -> _Tail:
    size = later.inputs.shape[1]
    place = jnp.arange(size, dtype=jnp.int32)[None, :] + later.filled[:, None]
    moved = jnp.take_along_axis(earlier.inputs, jnp.minimum(place, size - 1)[:, :, None], axis=1)
    inputs = jnp.where((place < size)[:, :, None], moved, later.inputs)
    return _Tail(inputs, jnp.minimum(earlier.filled + later.filled, size))
