"""Mamba-3: linear attention with two taps per write, keys and queries that turn, and biases instead of convolutions."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from memformer.core.checks import check, check_groups
from memformer.core.context import time_shards
from memformer.core.decay import CumulativeDecay, add_decay, running_decay
from memformer.core.segments import Segments, find_segments
from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import linear, named
from memformer.layers.convolution import shift_token
from memformer.layers.gates import step_bias
from memformer.layers.positions import check_rotary
from memformer.ops.linear_attention import linear_attention
from memformer.pallas.sharding import dividing_axes

__all__ = ["Mamba3", "Mamba3State"]

# Greatest log decay per unit of step, so that a head forgets at all.
LEAST_RATE = 1e-4


class Mamba3State(NamedTuple):
    """The memory of `Mamba3` after a token.

    Attributes:
      matrix: S, [B, H, K, V], float32.
      key: the token's key, turned, [B, H, K].
      value: its value, [B, H, V].
      turns: the angles of the pairs of channels, in turns from -1/2 to 1/2, [B, H, R], float32.
    """

    matrix: Array
    key: Array
    value: Array
    turns: Array


class _Gates(NamedTuple):
    """Gates of each token per head, [B, T, H], float32; angles of the pairs in turns, [B, T, H, R]."""

    decay: Array
    before: Array
    now: Array
    turns: Array


class Mamba3(MemoryLayer):
    """Mamba-3 with one input and one output per head (SISO).

        S_t = exp(g_t) (S_{t-1} + (1 - l_t) d_t k_{t-1} v_{t-1}^T) + l_t d_t k_t v_t^T
        k_t = R_t (rms(W_k x_t) + b_k);   q_t = R_t (rms(W_q x_t) + b_q);   o_t = S_t^T q_t + D v_t

    with a step d = softplus(W x + b), a log decay g = -d max(softplus(W x), 1e-4) and l = sigmoid(W x), each by
    weights of its own per head: the exponential-trapezoidal rule, whose second tap is the token before. R_t turns the
    first pairs of neighbouring channels by the sum of d_i pi tanh(W x_i) over i <= t: the state is complex. The
    angles before the step are those of all heads; b_k and b_q are of each head and channel, 1 at the start.

    The tap of the token before is written when its successor arrives, which is a linear attention on the tokens before:

        S'_t = exp(g_{t-1}) S'_{t-1} + (l_{t-1} d_{t-1} + (1 - l_t) d_t) k_{t-1} v_{t-1}^T
        S_t = exp(g_t) S'_t + l_t d_t k_t v_t^T

    Args:
      width: D.
      heads: H.
      key_heads: number of heads of the projections to q and k, shared by the H heads; None is H.
      partial_rotary_factor: fraction of the key width that turns, the first channels.
      rngs: random streams.
      **options: of `MemoryLayer`; the norm of queries and keys is `qk_norm`.

    Raises:
      ValueError: a fraction that leaves no pair of channels, key_heads that do not divide heads, or rotary positions.

    Source: arXiv 2603.15569.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key_heads: int | None = None,
        partial_rotary_factor: float = 0.5,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        keys = check_groups(heads, key_heads)
        super().__init__(width, heads=heads, head_counts=(keys, keys, heads), rngs=rngs, **options)
        check(not self.rotary, "rotary", "False: keys and queries turn by angles of their own", self.rotary)
        self.pairs = check_rotary(self.key_width, 1e4, partial_rotary_factor, None) // 2
        same: dict[str, Any] = {"dtypes": self.dtypes, "rngs": rngs, "wide": True}
        self.step, self.rate, self.mix = (linear(width, heads, ("embed", "heads"), **same) for _ in range(3))
        self.turn = linear(width, self.pairs, ("embed", None), **same)

        def parameter(init, size):
            return nnx.Param(named(init, "heads")(rngs.params(), (size,), self.dtypes.param))

        ones = nnx.initializers.ones
        self.step_bias, self.skip = parameter(step_bias, heads), parameter(ones, heads)
        self.query_bias, self.key_bias = (parameter(ones, heads * self.key_width) for _ in range(2))

    def _apply_op(self, x, parts, segment_ids, memory):
        wide, dtype = self.dtypes.wide, parts["v"].dtype
        batch, time = x.shape[:2]
        segments = find_segments(segment_ids, {"B": batch, "T": time})
        state = self._init_memory(batch, 0, dtype) if memory is None else memory
        gates, turns = self._gates(x, segments, state.turns)
        q = self._turned(parts["q"], self.query_bias, gates.turns)
        k, v = self._turned(parts["k"], self.key_bias, gates.turns), parts["v"]
        pair = jnp.concatenate([k, v], axis=-1)
        earlier, last = _before(pair, segments, jnp.concatenate([state.key, state.value], axis=-1))
        # The state before the call holds all but the second tap of the last token, so that token's gates are 0.
        own = jnp.stack([gates.decay, gates.now], axis=-1)
        gates_before, own_last = _before(own, segments, jnp.zeros_like(own[:, 0]))
        weight = gates_before[..., 1:] + gates.before[..., None]
        o, matrix = linear_attention(
            q,
            earlier[..., : self.key_width],
            (weight * earlier[..., self.key_width :].astype(wide)).astype(dtype),
            decay=gates_before[..., 0],
            scale=1.0,
            segment_ids=segment_ids,
            initial_state=state.matrix,
        )
        wide_v = v.astype(wide)
        match = jnp.sum(q.astype(wide) * k.astype(wide), axis=-1) * gates.now + self.skip[...].astype(wide)[None, None]
        o = jnp.exp(gates.decay)[..., None] * o.astype(wide) + match[..., None] * wide_v
        key, value = last[..., : self.key_width], last[..., self.key_width :]
        written = key.astype(wide)[..., :, None] * value.astype(wide)[..., None, :]
        matrix = jnp.exp(own_last[..., 0])[..., None, None] * matrix + own_last[..., 1][..., None, None] * written
        return o.astype(dtype), Mamba3State(matrix, key, value, turns)

    def _gates(self, x: Array, segments: Segments | None, start: Array) -> tuple[_Gates, Array]:
        """The gates of each token, and the angles after the last one."""
        step = nnx.softplus(self.step(x) + self.step_bias[...].astype(self.dtypes.wide)[None, None])
        mix = nnx.sigmoid(self.mix(x))
        decay = -step * jnp.maximum(nnx.softplus(self.rate(x)), LEAST_RATE)
        # Turns by pi tanh(.) per unit of step are halves of a whole one.
        turns = step[..., None] * (jnp.tanh(self.turn(x)) / 2)[:, :, None]
        # What all tokens of a document have turned by cancels between q and k: the sum passes from one to the next.
        if segments is not None:
            turns = jnp.where(segments.valid[:, :, None, None], turns, jnp.zeros_like(turns))
        total, last = _add_turns(turns.reshape(*turns.shape[:2], -1), start.reshape(start.shape[0], 1, -1))
        gates = _Gates(decay, (1 - mix) * step, mix * step, total.reshape(turns.shape))
        return gates, last.reshape(start.shape)

    def _turned(self, x: Array, bias: nnx.Param, turns: Array) -> Array:
        """x [B, T, G, K] of each head, with its bias, its first pairs of channels turned: [B, T, H, K]."""
        wide = self.dtypes.wide
        own = bias[...].astype(wide).reshape(1, 1, self.heads, -1)
        y = jnp.repeat(x, self.heads // x.shape[2], axis=2).astype(wide) + own
        angle = 2 * math.pi * turns
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        first, rest = y[..., : 2 * self.pairs].reshape(*turns.shape, 2), y[..., 2 * self.pairs :]
        a, b = first[..., 0], first[..., 1]
        first = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*y.shape[:3], -1)
        return jnp.concatenate([first, rest], axis=-1).astype(x.dtype)

    def _init_memory(self, batch, capacity, dtype):
        def zeros(*sizes, dtype=self.dtypes.wide):
            return jnp.zeros((batch, self.heads, *sizes), dtype)

        key, value = zeros(self.key_width, dtype=dtype), zeros(self.value_width, dtype=dtype)
        return Mamba3State(zeros(self.key_width, self.value_width), key, value, zeros(self.pairs))

    def state_letters(self, state):
        """The letters of the arrays of a state."""
        letters = super().state_letters(state)
        names = {"matrix": "B H K V", "key": "B H K", "value": "B H V", "turns": "B H R"}
        letters["memory"] = letters["memory"]._replace(**names)
        return letters


def _add_turns(turns: Array, start: Array) -> tuple[Array, Array]:
    """Sums [B, T, C] over time from `start` [B, 1, C], whole turns left out: of each token, and of the last one."""

    def begin(start):
        return CumulativeDecay(jnp.zeros_like(start, jnp.int32), start)

    shards = time_shards(turns.shape[1])
    if shards is None:
        total = running_decay(turns, begin(start)).fraction
        return total, total[:, -1:]

    def local(turns, start):
        before = begin(vary_like(shards.vary(start), turns))
        own = running_decay(turns)
        last = CumulativeDecay(own.whole[:, -1:], own.fraction[:, -1:])
        before = shards.earlier(add_decay, shards.first(add_decay(before, last), last), before)
        total = add_decay(before, own).fraction
        return total, shards.from_last(total[:, -1:])

    batch, channels = dividing_axes(turns.shape[0], turns.shape[2])
    specs = shards.spec(batch, channels), PartitionSpec(batch, None, channels)
    return shards.run(local, (*(batch or ()), *(channels or ())), specs, specs)(turns, start)


def _before(x: Array, segments: Segments | None, start: Array) -> tuple[Array, Array]:
    """x [B, T, H, C] of the token before, and of the last token of the call [B, H, C]; `start` is [B, H, C]."""
    flat = x.reshape(*x.shape[:2], -1)
    shifted, last = shift_token(flat, segments, start.reshape(start.shape[0], 1, -1).astype(x.dtype))
    return shifted.reshape(x.shape), last.reshape(start.shape)
