"""DeltaFormer's write on Hopper by parts of a call: memory is linear in time, backward too.

What a part's rows see of slots before it is attention over keys and u that are there already: programs for all row
blocks of all heads, so that few heads fill the chip. The walk (write.py) is left with what lies within a part.
Backward, parts in reverse: what later rows take of a part's dU, again all blocks at once; then the walk for dP. When
all of dP is there, the gradients of the scores are those of attention.

Saved: the inputs, u, and the log-sum-exp of the rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array
from memformer.pallas.gpu.attention.backward import column_gradients, row_gradients
from memformer.pallas.gpu.attention.forward import read
from memformer.pallas.gpu.attention.tiles import Plan
from memformer.pallas.gpu.attention.write import walk_back, walk_forward

__all__ = ["write"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(plan: Plan, k: Array, w: Array, v: Array, alpha: Array, beta: Array, held: Array, marks: tuple[Array, ...]):
    """The writes u [B, G, T, V] of a call, float32, to 16 bits.

    Args:
      plan: how the call is cut; `before` counts the blocks of the state. T is a multiple of its part.
      k: keys of the state and then of the call, [B, G, S, K].
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha: [B, G, T].
      beta: [B, G, T].
      held: u of the state, [B, G, S - T, V].
      marks: segments of the tokens [B, T] and of all slots [B, S], or nothing.
    """
    (high, low), _ = _write(plan, k, w, v, alpha, beta, held, marks)
    before = held.shape[2]
    return high[:, :, before:].astype(jnp.float32) + low[:, :, before:].astype(jnp.float32)


def _plans(plan: Plan) -> tuple[Plan, Plan]:
    """The walk within a part, and the read of all before it."""
    far = dataclasses.replace(plan, before=0, own=False, strict=True)
    return dataclasses.replace(far, own=True), far


def _both(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 halves of a float32 array."""
    # The compiler may take a cast to bfloat16 and back for nothing, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _cut(x: Array, start, size: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _marks_of(plan: Plan, marks: tuple[Array, ...], start, before: int) -> tuple[Array, ...]:
    """Segments of a part's tokens, as queries and as keys."""
    if not marks:
        return ()
    return _cut(marks[0], start, plan.part, 1), _cut(marks[1], before + start, plan.part, 1)


def _write(plan, k, w, v, alpha, beta, held, marks):
    """u of all slots by halves [B, G, S, V], and the log-sum-exp of the rows [B, G, T], None without a normaliser."""
    before, length, part = held.shape[2], w.shape[2], plan.part
    own, far = _plans(plan)
    target = alpha[..., None] * v.astype(jnp.float32)
    if before == 0 and length == part:
        return walk_forward(own, k, w, target, beta, marks, None)
    empty = jnp.zeros((*target.shape[:2], 0, target.shape[3]), jnp.bfloat16)
    state = _both(held) if before else (empty, empty)
    everything = tuple(jnp.concatenate([x, jnp.zeros(target.shape, jnp.bfloat16)], axis=2) for x in state)

    def step(everything, start):
        rows, here = _cut(w, start, part), _marks_of(plan, marks, start, before)
        value, norm = read(far, jnp.float32, k, rows, everything, (here[0], marks[1]) if marks else (), before + start)
        k_own, target_own = _cut(k, before + start, part), _cut(target, start, part)
        u, norm = walk_forward(own, k_own, rows, target_own, _cut(beta, start, part), here, (value, norm))
        everything = tuple(
            lax.dynamic_update_slice_in_dim(x, y, before + start, 2) for x, y in zip(everything, u, strict=True)
        )
        return everything, norm

    starts = jnp.arange(0, length, part, dtype=jnp.int32)
    everything, norms = lax.scan(step, everything, starts)
    return everything, None if norms is None else jnp.moveaxis(norms, 0, 2).reshape(beta.shape)


def _write_forward(plan, k, w, v, alpha, beta, held, marks):
    u, norm = _write(plan, k, w, v, alpha, beta, held, marks)
    before = held.shape[2]
    written = u[0][:, :, before:].astype(jnp.float32) + u[1][:, :, before:].astype(jnp.float32)
    return written, (k, w, v, alpha, beta, held, marks, u, norm)


def _write_backward(plan, kept, du):
    k, w, v, alpha, beta, held, marks, u, norm = kept
    before = held.shape[2]
    dp = _solve_back(plan, k[:, :, before:], w, beta, norm, du, u[0][:, :, before:], marks)
    exact = dp[0].astype(jnp.float32) + dp[1].astype(jnp.float32)
    numbers = {"norm": norm, "beta": beta, "mean": None}
    if norm is not None:
        written = u[0][:, :, before:].astype(jnp.float32) + u[1][:, :, before:].astype(jnp.float32)
        numbers["mean"] = -jnp.sum(exact * (alpha[..., None] * v.astype(jnp.float32) - written), axis=-1)
    all_slots = dataclasses.replace(plan, own=True, strict=True)
    dw, dbeta = row_gradients(all_slots, k, w, u, dp, marks, numbers)
    (dk,) = column_gradients(all_slots, k, w, u, dp, marks, numbers, ("dk",))
    dheld = jnp.zeros(held.shape, held.dtype)
    if before:
        _, far = _plans(plan)
        state = (k[:, :, :before], w, tuple(x[:, :, :before] for x in u), dp)
        seen = (marks[0], marks[1][:, :before]) if marks else ()
        (dheld,) = column_gradients(far, *state, seen, numbers, ("dx",))
    dv, dalpha = alpha[..., None] * exact, jnp.sum(v.astype(jnp.float32) * exact, axis=-1)
    like = (k, w, v, alpha, beta, held)
    gradients = (dk, dw, dv, dalpha, dbeta, dheld)
    return *(x.astype(y.dtype) for x, y in zip(gradients, like, strict=True)), None


def _solve_back(plan, k, w, beta, norm, du, u, marks):
    """dP by halves [B, G, T, V], from the last part to the first; arrays of the call's own slots."""
    length, part, before = w.shape[2], plan.part, plan.before * plan.size
    own, far = _plans(plan)
    numbers = {"norm": norm, "beta": beta, "mean": norm}
    if length == part:
        return walk_back(own, k, w, du, numbers, (marks[0], marks[1][:, before:]) if marks else ())
    dp = (jnp.zeros(du.shape, jnp.bfloat16),) * 2

    def step(dp, start):
        here = _marks_of(plan, marks, start, before)
        cut = {name: None if x is None else _cut(x, start, part) for name, x in numbers.items()}
        columns, values = _cut(k, start, part), (_cut(u, start, part),)
        seen = (marks[0], here[1]) if marks else ()
        (later,) = column_gradients(far, columns, w, values, dp, seen, numbers, ("dx",), start + part)
        new = walk_back(own, columns, _cut(w, start, part), _cut(du, start, part) + later, cut, here)
        return tuple(lax.dynamic_update_slice_in_dim(x, y, start, 2) for x, y in zip(dp, new, strict=True)), None

    starts = jnp.arange(0, length, part, dtype=jnp.int32)
    return lax.scan(step, dp, starts, reverse=True)[0]


write.defvjp(_write_forward, _write_backward)
