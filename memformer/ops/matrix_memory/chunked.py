"""The chunkwise form of every memory with a matrix state: linear attention and the delta rule, with its backward.

One chunk of C tokens, state S before it, G the cumulative log decay inside it (every exponent used is <= 0):

    A = diag(beta) tril(K K^T * exp(G_r - G_i), -1)     X = (I + A)^-1
    U = X diag(beta) (V - (exp(G) K) S)                 where writes add: U = V
    P = tril(Q K^T * exp(G_r - G_i))                    O = (exp(G) Q) S + P U
    S' = exp(G_C) S + (exp(G_C - G) K)^T U

Chunks go through in groups. What does not need the state (scores, X, W = X diag(beta) exp(G) K, Y = X diag(beta) V) is
computed for a group at once, then a short loop of two products a chunk carries the state (U = Y - W S), then the
reads of the group at once: few large products, and a working set that stays in cache. The backward pass runs the same
way from the end, from U, X and the states at the chunks' starts; it recomputes the scores.

Source: arXiv 2406.06484 (chunkwise delta rule), 2412.06464 (decay a head), 2510.26692 (decay a channel).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory.arguments import Memory, spread_heads, zero_state
from memformer.ops.matrix_memory.scores import decayed_scores, repeat_tokens, total_decay

__all__ = ["chunkwise", "default_chunk"]


class Plan(NamedTuple):
    """What is static: tokens a chunk, chunks a group, factor on the read, precision of the products."""

    size: int
    group: int
    scale: float
    precision: lax.Precision | None

    @property
    def tokens(self) -> int:
        """Tokens a group."""
        return self.size * self.group

    def product(self, a: Array, b: Array) -> Array:
        """a @ b."""
        return jnp.matmul(a, b, precision=self.precision)


class Inputs(NamedTuple):
    """Arrays [B, T, writes, H, width], or one group of them [N, B, H, C * writes, width]; None where absent."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    decay: Array | None


class Features(NamedTuple):
    """What a group is made of before the state comes in; [N, B, H, ...].

    Attributes:
      enter_q: exp(G) Q scale.
      enter_k: exp(G) K, or None where writes add.
      leave_k: exp(G_C - G) K.
      keep: [N, B, H, 1 or K, 1] what of the carried state is kept, or None for all.
      read: P scale.
      match: A without beta, or None where writes add.
    """

    enter_q: Array
    enter_k: Array | None
    leave_k: Array
    keep: Array | None
    read: Array
    match: Array | None


class Saved(NamedTuple):
    """What the backward pass gets of a group."""

    inverse: Array | None
    u: Array
    states: Array


def chunkwise(
    memory: Memory, scale: float, chunk_size: int, precision=None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a memory chunk by chunk: what the recurrence gives, in matrix products.

    Args:
      memory: checked arguments.
      scale: factor on the read.
      chunk_size: tokens a chunk.
      precision: of the products (the inverse always runs at the highest).

    Returns:
      The output in the accumulation dtype, and the state.
    """
    memory = spread_heads(memory)
    q, k, v, beta, decay, segments, state = memory
    length = q.shape[1]
    chunks = -(-length // chunk_size)
    group = _group_size(memory, chunk_size, chunks)
    plan = Plan(chunk_size, group, scale, matmul_precision(precision, q, k, v))
    inputs = Inputs(
        q[:, :, None],
        k,
        v,
        None if beta is None else beta[..., None],
        None if decay is None else decay[:, :, None],
    )
    state = zero_state(memory) if state is None else state
    index = None if segments is None else segments.index
    # All or none varies over an axis of a surrounding shard_map, cotangents too.
    everything = (*inputs, state)
    inputs = Inputs(*(None if x is None else vary_like(x, *everything) for x in inputs))
    output, state = _run(plan, inputs, vary_like(state, *everything), index)
    return output, state


def default_chunk(memory: Memory) -> int:
    """Tokens a chunk where the caller leaves the choice.

    On a CPU 16 writes were fastest while a head's state fits beside its chunk in the inner cache, 32 beyond; 64 fill
    a tensor core (benchmarks/results).
    """
    small = memory.k.shape[-1] * memory.v.shape[-1] <= 64 * 64
    rows = (16 if small else 32) if jax.default_backend() == "cpu" else 64
    return max(1, min(rows // memory.k.shape[2], 1 << (memory.q.shape[1] - 1).bit_length()))


def _group_size(memory: Memory, size: int, chunks: int) -> int:
    """Chunks a group: one on a CPU, whose cache holds little more; elsewhere what fills the device."""
    if jax.default_backend() == "cpu":
        return 1
    batch, _, writes, heads, width = memory.k.shape
    most = max(1, min(64, (1 << 24) // (batch * heads * size * writes * max(width, memory.v.shape[-1]))))
    # Even groups, so that little of the last one is padding.
    return -(-chunks // -(-chunks // most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: Plan, inputs: Inputs, state: Array, index: Array | None) -> tuple[Array, Array]:
    return _walk(plan, inputs, state, index, lambda saved: None)[:2]


def _run_forward(plan, inputs, state, index):
    output, state, saved = _walk(plan, inputs, state, index, lambda saved: saved)
    return (output, state), (inputs, index, saved)


def _walk(plan: Plan, inputs: Inputs, state: Array, index: Array | None, keep: Callable):
    """Output, state, and what `keep` keeps of each group for the backward pass."""
    batch, length, _, heads, width = inputs.v.shape
    flat, marks = _flatten(plan, inputs, index)
    dtype = accumulation_dtype(inputs.q, inputs.k, inputs.v)

    def step(carry, at):
        state, output = carry
        i, marks = at
        state, new, saved = _forward(plan, state, *_open(plan, _group(plan, flat, inputs, i), marks))
        return (state, _put(plan, output, _close(new, 1), i)), keep(saved)

    padded = flat.v.shape[1]
    output = vary_like(jnp.zeros((batch, padded, heads * width), dtype), state)
    (state, output), saved = lax.scan(step, (state, output), (_places(plan, padded), marks))
    return output[:, :length].reshape(batch, length, heads, width), state, saved


def _run_backward(plan, residuals, gradients):
    inputs, index, saved = residuals
    of_output, of_state = gradients
    batch, length, _, heads, width = inputs.v.shape
    flat, marks = _flatten(plan, inputs, index)
    of_output = pad_time(of_output.reshape(batch, length, -1), plan.tokens)
    writes = inputs.k.shape[2]

    def step(carry, at):
        of_state, of_inputs = carry
        i, marks, saved = at
        wide, masks = _open(plan, _group(plan, flat, inputs, i), marks)
        rows = _rows(_take(plan, of_output, i).reshape(batch, plan.tokens, 1, heads, width), plan.group)
        of_state, of_wide = _backward(plan, wide, masks, saved, rows, of_state)
        counts = (1, writes, writes, writes, 1)
        of_inputs = Inputs(
            *(
                None if x is None else _put(plan, x, _close(g, n).astype(x.dtype), i)
                for x, g, n in zip(of_inputs, of_wide, counts, strict=True)
            )
        )
        return (of_state, of_inputs), None

    empty = Inputs(*(None if x is None else vary_like(jnp.zeros(x.shape, x.dtype), of_state) for x in flat))
    places = _places(plan, flat.q.shape[1])
    (of_state, of_inputs), _ = lax.scan(step, (of_state, empty), (places, marks, saved), reverse=True)
    pairs = zip(of_inputs, inputs, strict=True)
    return Inputs(*(None if x is None else g[:, :length].reshape(x.shape) for g, x in pairs)), of_state, None


_run.defvjp(_run_forward, _run_backward)


def _flatten(plan: Plan, inputs: Inputs, index: Array | None):
    """Arrays [B, T, all the rest] with time in whole groups; segments by group, with the one each chunk starts in.

    Groups are sliced where they lie: a scan over an axis of groups, or an axis of size 1 more, has the compiler copy
    every input first.
    """
    flat = Inputs(*(None if x is None else pad_time(x.reshape(*x.shape[:2], -1), plan.tokens) for x in inputs))
    if index is None:
        return flat, None
    # Padding at the end belongs to the last segment, so that the state that is left is the last segment's.
    index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % plan.tokens)), mode="edge")
    chunks = index.reshape(index.shape[0], -1, plan.size)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)))

    def grouped(x):
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, plan.group, *x.shape[1:])

    return flat, (grouped(chunks), grouped(before))


def _places(plan: Plan, padded: int) -> Array:
    return jnp.arange(padded // plan.tokens, dtype=jnp.int32)


def _take(plan: Plan, x: Array, i: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, i * jnp.int32(plan.tokens), plan.tokens, axis=1)


def _put(plan: Plan, x: Array, new: Array, i: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, new.reshape(*new.shape[:2], -1), i * jnp.int32(plan.tokens), axis=1)


def _group(plan: Plan, flat: Inputs, like: Inputs, i: Array) -> Inputs:
    """Group i of the arrays, in the shapes of `like`."""
    pairs = zip(flat, like, strict=True)
    return Inputs(
        *(None if x is None else _take(plan, x, i).reshape(x.shape[0], plan.tokens, *y.shape[2:]) for x, y in pairs)
    )


def _rows(x: Array, chunks: int) -> Array:
    """[B, T, writes, H, width] of a group to [N, B, H, C * writes, width]."""
    batch, _, _, heads, width = x.shape
    return x.reshape(batch, chunks, -1, heads, width).transpose(1, 0, 3, 2, 4)


def _close(x: Array, writes: int) -> Array:
    """Back from `_rows`."""
    _, batch, heads, _, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, -1, writes, heads, width)


def _open(plan: Plan, cut: Inputs, segments):
    """A group in the accumulation dtype, and its segments: which pairs share one, entering, leaving, staying."""
    dtype = accumulation_dtype(cut.q, cut.k, cut.v)
    wide = Inputs(*(None if x is None else _rows(x, plan.group).astype(dtype) for x in cut))
    if segments is None:
        return wide, None
    index, before = segments
    same = index[..., :, None] == index[..., None, :]
    enter, leave, keep = index == before[..., None], index == index[..., -1:], index[..., -1:] == before[..., None]
    return wide, (same[:, :, None], *(m[:, :, None, :, None].astype(dtype) for m in (enter, leave, keep)))


def _features(plan: Plan, inputs: Inputs, masks) -> Features:
    q, k = inputs.q * plan.scale, inputs.k
    writes = k.shape[-2] // q.shape[-2]
    matching = inputs.beta is not None
    total = None if inputs.decay is None else total_decay(inputs.decay)
    read, match = decayed_scores(q, k, total, None if masks is None else masks[0], matching, plan.precision)
    enter = leave = keep = None
    if total is not None:
        last = total[..., -1:, :]
        enter, leave = jnp.exp(total.whole + total.rest), jnp.exp(last.since(total))  # type: ignore[attr-defined]
        keep = _t(enter[..., -1:, :])
    if masks is not None:
        factors = zip(masks[1:], (enter, leave, keep), strict=True)
        enter, leave, keep = (mask if x is None else mask * x for mask, x in factors)
    enter_k, leave_k = (k if x is None else k * repeat_tokens(x, writes) for x in (enter, leave))
    return Features(q if enter is None else q * enter, enter_k if matching else None, leave_k, keep, read, match)


def _solve(plan: Plan, inputs: Inputs, features: Features):
    """X, W and Y of the chunks."""
    inverse = unit_lower_inverse(inputs.beta * features.match)
    width = inputs.k.shape[-1]
    both = plan.product(inverse, inputs.beta * jnp.concatenate([features.enter_k, inputs.v], axis=-1))
    return inverse, both[..., :width], both[..., width:]


def _forward(plan: Plan, state: Array, inputs: Inputs, masks) -> tuple[Array, Array, Saved]:
    features = _features(plan, inputs, masks)
    inverse = w = None
    y = inputs.v
    if inputs.beta is not None:
        inverse, w, y = _solve(plan, inputs, features)

    def step(state, chunk):
        w, y, leave_k, keep = chunk
        u = y if w is None else y - plan.product(w, state)
        kept = state if keep is None else state * keep
        return kept + plan.product(jnp.swapaxes(leave_k, -1, -2), u), (u, state)

    last, (u, states) = lax.scan(step, state, (w, y, features.leave_k, features.keep))
    output = plan.product(features.enter_q, states) + plan.product(features.read, u)
    return last, output, Saved(inverse, u, states)


def _backward(plan: Plan, inputs: Inputs, masks, saved: Saved, of_output, of_state) -> tuple[Array, Inputs]:
    """Gradients of a group's inputs, and of the state before it."""
    features, pull = jax.vjp(lambda inputs: _features(plan, inputs, masks), inputs)
    inverse, u, states = saved
    w = None
    if inverse is not None:
        w = plan.product(inverse, inputs.beta * features.enter_k)
    from_read = plan.product(_t(features.read), of_output)
    from_output = plan.product(_t(features.enter_q), of_output)

    def step(of_state, chunk):
        w, leave_k, keep, from_read, from_output = chunk
        of_u = from_read + plan.product(leave_k, of_state)
        before = (of_state if keep is None else of_state * keep) + from_output
        return before if w is None else before - plan.product(_t(w), of_u), (of_u, of_state)

    chunks = (w, features.leave_k, features.keep, from_read, from_output)
    of_start, (of_u, of_ends) = lax.scan(step, of_state, chunks, reverse=True)

    of_keep = None
    if features.keep is not None:
        axes = [axis for axis, size in enumerate(features.keep.shape) if size == 1]
        of_keep = jnp.sum(of_ends * states, axis=axes, keepdims=True)
    of_features = Features(
        enter_q=plan.product(of_output, _t(states)),
        enter_k=None,
        leave_k=plan.product(u, _t(of_ends)),
        keep=of_keep,
        read=plan.product(of_output, _t(u)),
        match=None,
    )
    if inverse is None:
        (of_inputs,) = pull(of_features)
        return of_start, of_inputs._replace(v=of_inputs.v + of_u)
    of_right = plan.product(_t(inverse), of_u)
    of_a = -plan.product(of_right, _t(u))
    scaled = inputs.beta * of_right
    of_entering = plan.product(of_right, _t(states))
    of_features = of_features._replace(enter_k=-inputs.beta * of_entering, match=inputs.beta * of_a)
    (of_inputs,) = pull(of_features)
    of_beta = (
        jnp.sum(of_right * inputs.v, axis=-1, keepdims=True)
        - jnp.sum(of_entering * features.enter_k, axis=-1, keepdims=True)
        + jnp.sum(of_a * features.match, axis=-1, keepdims=True)
    )
    return of_start, of_inputs._replace(v=of_inputs.v + scaled, beta=of_inputs.beta + of_beta)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
