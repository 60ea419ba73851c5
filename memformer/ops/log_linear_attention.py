"""Log-linear attention: a matrix memory with one state per power of two of the past, each with its own weight."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.checks import check, check_array
from memformer.core.context import refuse_sharded_time
from memformer.core.dispatch import dispatch
from memformer.core.segments import Segments, clear
from memformer.core.sharding import keep_shardings, vary_like
from memformer.core.symbolic import padding_to
from memformer.core.types import Array, Dims, Float, Int
from memformer.ops.matrix_memory.arguments import make_call
from memformer.ops.matrix_memory.chunked import tokens_per_chunk
from memformer.ops.matrix_memory.chunks import by_time, load_chunks, refuse_kernel, resets, split_chunks, unsplit_chunks
from memformer.pallas.platform import preferred

__all__ = ["LogLinearState", "log_linear_attention"]


class LogLinearState(NamedTuple):
    """State of `log_linear_attention`.

    Attributes:
      levels: sums of decayed k v^T over blocks of the past, level 0 first, in float32 (float64 for float64 inputs).
      length: tokens of the current segment so far, int32.

    Example:
      >>> LogLinearState(levels=jnp.zeros((1, 2, 5, 8, 4)), length=jnp.zeros(1, jnp.int32)).levels.shape
      (1, 2, 5, 8, 4)
    """

    levels: Float[Array, "B H L K V"]
    length: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, eq=False)
class LogLinearCall(MatrixCall):
    """A call of log-linear attention; `state` holds the levels.

    Attributes:
      weights: level weights [B, T, H, L].
      position: of each token in its segment [B, T]; padding has that of the token before it.
      before: position [B] of the last token before the call, -1 where there is none.
    """

    weights: Array
    position: Array
    before: Array


@keep_shardings
def log_linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    level_weights: Float[Array, "B T H L"],
    *,
    decay: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LogLinearState | None = None,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], LogLinearState]:
    """Adds each value at its key, and reads the past in blocks of doubling size, each with its own weight.

        o_t = scale sum_{i <= t} level_weights_{t, l(t, i)} exp(decay_{i+1} + ... + decay_t) (q_t . k_i) v_i

    Level l(t, i) is the number of bits of t xor i, with positions counted from 0 in each segment: 0 is the token
    itself, and level l > 0 an aligned block of 2^(l - 1) tokens before t, as in a Fenwick tree. The last level also
    holds all older tokens, so that L levels are exact up to 2^(L - 1) tokens and any T is allowed. With equal weights
    this is `linear_attention`. The state holds one K x V matrix per level: L grows as log2 of the longest sequence.

    Args:
      q: queries. G may be less than the number of value heads H; query and key head g then serves the H / G value
        heads from g H / G on.
      k: keys.
      v: values.
      level_weights: factor of each level in the read of a token (lambda in the paper).
      decay: log decay (at most 0) of the state before each token; None is 0.
      scale: factor on the read; None is K ** -0.5.
      segment_ids, chunk_size, precision: see `memformer.ops`.
      initial_state: of an earlier call with as many levels; None is empty.
      implementation: None, "recurrent" or "chunked"; see `memformer.ops`. "pallas" raises: there is no kernel.

    Returns:
      The output in v's dtype, and the state.

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`; also NotImplementedError where time is divided over devices.

    Source: arXiv 2506.04761 sections 3.1 and 3.2 (log-linear Mamba-2).

    Example:
      >>> x, weights = jnp.ones((1, 4, 1, 1)), jnp.array([1.0, 10.0, 100.0])
      >>> output, state = log_linear_attention(x, x, x, jnp.broadcast_to(weights, (1, 4, 1, 3)))
      >>> output[0, :, 0, 0]
      Array([  1.,  11., 201., 211.], dtype=float32)
      >>> state.levels[0, 0, :, 0, 0], state.length
      (Array([1., 1., 2.], dtype=float32), Array([4], dtype=int32))
    """
    dims: Dims = {}
    for name, x, letters in (("q", q, "B T G K"), ("k", k, "B T G K"), ("v", v, "B T H V")):
        check_array(name, x, letters, dims)
    level_weights = check_array("level_weights", level_weights, "B T H L", dims)
    if decay is not None:
        check_array("decay", decay, "B T H", dims)
    call = make_call(
        "log_linear_attention",
        q,
        k,
        v,
        None,
        decay=decay,
        scale=scale,
        segment_ids=segment_ids,
        initial_state=None,
        chunk_size=chunk_size,
        precision=precision,
        erases=False,
    )
    refuse_sharded_time(call.op, dims["T"])
    levels, length = _start(initial_state, dims, call.state)
    whole = LogLinearCall(
        **vars(call) | {"state": levels},
        weights=clear(None if call.segments is None else call.segments.valid, level_weights),
        position=_positions(call.segments, length, dims["T"]),
        before=length - 1,
    )
    prefer = tuple(name for name in preferred(dims["T"]) if name != "pallas")
    output, levels = dispatch(whole, implementation, IMPLEMENTATIONS, prefer)
    return output.astype(call.v.dtype), LogLinearState(levels, whole.position[:, -1] + 1)


def _start(state: LogLinearState | None, dims: Dims, empty: Array) -> tuple[Array, Array]:
    """The checked levels and length to start from."""
    if state is None:
        levels = jnp.zeros((*empty.shape[:2], dims["L"], *empty.shape[2:]), empty.dtype)
        return vary_like(levels, empty), vary_like(jnp.zeros(dims["B"], jnp.int32), empty)
    check(isinstance(state, LogLinearState), "initial_state", "a LogLinearState", type(state).__name__)
    levels = check_array("initial_state.levels", state.levels, "B H L K V", dims)
    length = check_array("initial_state.length", state.length, "B", dims, kind=jnp.integer)
    return levels.astype(empty.dtype), length.astype(jnp.int32)


def _positions(segments: Segments | None, length: Array, tokens: int) -> Array:
    if segments is None:
        return length[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    count = jnp.cumsum(segments.valid, axis=1, dtype=jnp.int32)
    starts = jnp.diff(segments.index, axis=1, prepend=jnp.zeros_like(segments.index[:, :1])) != 0
    earlier = lax.cummax(jnp.where(starts, count - 1, 0), axis=1)
    return count - 1 - earlier + jnp.where(segments.index == 0, length[:, None], 0)


def _level(a: Array, b: Array, levels: int) -> Array:
    """Number of bits of a xor b, at most the last level."""
    return jnp.minimum(32 - lax.clz(a ^ b), levels - 1)


def _merge(states: Array, level: Array) -> Array:
    """Moves all levels up to `level` [B] into it: what lies there once the position has changed in that many bits.

    A block of level m seen from a later token is on level max(m, level), because positions only grow.
    """
    place = jnp.arange(states.shape[2], dtype=jnp.int32)[None]
    below, at = (x[:, None, :, None, None] for x in (place <= level[:, None], place == level[:, None]))
    zero = jnp.zeros((), states.dtype)
    total = jnp.sum(jnp.where(below, states, zero), axis=2, keepdims=True)
    return jnp.where(at, total, jnp.where(below, zero, states))


def _run_recurrent(call: LogLinearCall) -> tuple[Array, Array]:
    dtype, levels = call.state.dtype, call.state.shape[2]
    repeats = call.v.shape[2] // call.q.shape[2]
    previous = jnp.concatenate([call.before[:, None], call.position[:, :-1]], axis=1)
    level = jnp.moveaxis(_level(call.position, previous, levels), 1, 0)
    decay = None if call.decay is None else by_time(call.decay)
    arrays = (by_time(call.q, repeats), by_time(call.k, repeats), by_time(call.v), by_time(call.weights), decay)
    first = jax.nn.one_hot(0, levels, dtype=dtype)[None, None, :, None, None]

    def step(states, token):
        *arrays, level, reset = token
        q, k, v, weights, decay = (None if x is None else x.astype(dtype) for x in arrays)
        if reset is not None:
            states = jnp.where(reset[:, None, None, None, None], jnp.zeros_like(states), states)
        states = _merge(states, level)
        if decay is not None:
            states = states * jnp.exp(decay)[..., None, None, None]
        states = states + first * (k[..., :, None] * v[..., None, :])[:, :, None]
        reads = jnp.einsum("bhk,bhlkv->bhlv", q, states, precision=call.precision)
        return states, call.scale * jnp.einsum("bhl,bhlv->bhv", weights, reads, precision=call.precision)

    inputs = tuple(None if x is None else vary_like(x, call.state) for x in arrays)
    states = vary_like(call.state, *inputs, level)
    states, output = lax.scan(step, states, (*inputs, level, resets(call)))
    return jnp.moveaxis(output, 0, 1), states


def _run_chunked(call: LogLinearCall) -> tuple[Array, Array]:
    """One chunk after the other: a product of the queries with all levels, and one with the chunk's own tokens.

    Tokens of a chunk may lie anywhere in their segments: the level of each pair, and of each state seen from each
    token, follows from the positions. The backward pass recomputes a chunk from the levels at its start.
    """
    tokens, levels = call.q.shape[1], call.state.shape[2]
    size = tokens_per_chunk(call)
    chunks = load_chunks(call, size)

    def product(a, b):
        return jnp.matmul(a, b, precision=call.precision)

    def one_hot(level):
        return jax.nn.one_hot(level, levels, dtype=call.state.dtype)

    def each_level(factors, x):
        """[B, H, C, L] and [B, H, C, K] to their products [B, H, C, L K]."""
        return (factors[..., None] * x[..., None, :]).reshape(*x.shape[:-1], -1)

    place = jnp.arange(levels, dtype=jnp.int32)[None, None]

    @jax.checkpoint
    def step(states, chunk):
        chunk, weights, position, before = chunk
        batch, heads, _, key_width, value_width = states.shape
        flat = batch, heads, levels * key_width, value_width
        between = _level(position[:, :, None], position[:, None, :], levels)
        own = jnp.einsum("bhcl,bcil->bhci", weights, one_hot(between), precision=call.precision)
        # Weight of each state, which from this token may lie on a higher level.
        seen = jnp.maximum(_level(position, before[:, None], levels)[..., None], place)
        carried = jnp.einsum("bhcl,bcml->bhcm", weights, one_hot(seen), precision=call.precision)
        output = product(each_level(carried, chunk.q * chunk.decay_in), states.reshape(flat))
        scores = product(chunk.q, jnp.swapaxes(chunk.k, -1, -2)) * chunk.pairs * own
        output = output + product(scores, chunk.v)
        last = position[:, -1]
        states = _merge(states, _level(last, before, levels)) * chunk.chunk_decay[..., None]
        written = one_hot(_level(last[:, None], position, levels))[:, None]
        written = product(jnp.swapaxes(each_level(written, chunk.k * chunk.decay_out), -1, -2), chunk.v)
        return states + written.reshape(states.shape), call.scale * output

    weights = split_chunks(call.weights, size, call.state)
    # Missing tokens at the end have the position of the last, so that the state stays where it is.
    position = jnp.pad(call.position, ((0, 0), (0, padding_to(tokens, size))), mode="edge")
    position = jnp.moveaxis(position.reshape(position.shape[0], -1, size), 1, 0)
    before = jnp.concatenate([call.before[None], position[:-1, :, -1]], axis=0)
    arrays = jax.tree.map(lambda x: vary_like(x, call.state, weights, chunks.v), (chunks, weights, position, before))
    states, output = lax.scan(step, vary_like(call.state, weights, chunks.v), arrays)
    return unsplit_chunks(output, tokens), states


IMPLEMENTATIONS = {"recurrent": _run_recurrent, "chunked": _run_chunked, "pallas": refuse_kernel}
