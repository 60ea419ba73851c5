"""The chunked form of the matrix memories, with its backward pass.

For one chunk of C tokens, with the state S before it and the cumulative log decay G inside it (no exponent used is
positive):

    A = diag(beta) tril(W K^T * exp(G_r - G_i), -1)       X = (I + A)^-1
    U = X (diag(alpha) V - diag(beta) (exp(G) W) S)       where writes only add: U = V
    P = tril(Q K^T * exp(G_r - G_i))                      O = (exp(G) Q) S + P U
    S' = exp(G_C) S + (exp(G_C - G) K)^T U

W is K and alpha is beta where a call has none.

Chunks are processed in groups. The terms that do not need the state (scores, X, Z = X diag(beta) exp(G) W and
Y = X diag(alpha) V) are computed for a whole group, then a scan with two products per chunk carries the state
(U = Y - Z S), then the group's reads: few large products, and a working set that stays in cache. The backward pass
runs in the same way from the end. It starts from U, X and the states at the starts of the chunks, and recomputes the
scores.

Source: arXiv 2406.06484 (chunked delta rule), 2412.06464 (decay per head), 2510.26692 (decay per channel).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.autodiff import in_forward_mode
from memformer.core.calls import MatrixCall
from memformer.core.decay import cumulative_decay, decay_to_end
from memformer.core.documents import take_tokens
from memformer.core.numerics import accumulation_dtype, repeat_heads
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.symbolic import is_symbolic
from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory import documents, groups
from memformer.ops.matrix_memory.groups import ChunkScan, Inputs, Masks
from memformer.ops.matrix_memory.scores import decayed_scores, repeat_tokens

__all__ = ["run", "tokens_per_chunk"]


class Features(NamedTuple):
    """The terms of a group that do not depend on the state; [M, B, H, ...].

    Attributes:
      q_in: exp(G) Q scale.
      w_in: exp(G) W, or None where writes only add.
      k_out: exp(G_C - G) K.
      chunk_decay: [M, B, H, 1 or K, 1] factor on the state over a chunk, or None for 1.
      qk: P scale.
      wk: A without beta, or None where writes only add.
    """

    q_in: Array
    w_in: Array | None
    k_out: Array
    chunk_decay: Array | None
    qk: Array
    wk: Array | None


class Residuals(NamedTuple):
    """Saved for the backward pass of a group."""

    inverse: Array | None
    u: Array
    states: Array


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Array]:
    """Runs a matrix memory chunk by chunk, in matrix products.

    Returns:
      The output in the accumulation dtype, and the state.
    """
    repeats = call.v.shape[2] // call.q.shape[2]
    inputs = Inputs(
        repeat_heads(call.q, repeats),
        repeat_heads(call.k, repeats),
        call.v,
        None if call.w is None else repeat_heads(call.w, repeats),
        None if call.alpha is None else call.alpha[..., None],
        None if call.beta is None else call.beta[..., None],
        call.decay if call.decay is None or call.decay_per_channel else call.decay[..., None],
    )
    size = tokens_per_chunk(call)
    plan = ChunkScan(size, _group_size(inputs, size, call.writes), call.writes, call.scale, call.precision)
    # All or none must vary over an axis of a surrounding shard_map, cotangents too.
    arrays = (*inputs, call.state)
    inputs = Inputs(*(None if x is None else vary_like(x, *arrays) for x in inputs))
    state = vary_like(call.state, *arrays)
    index = None if call.segments is None else call.segments.index
    scan = _scan_plain if in_forward_mode(arrays) else _scan_chunks
    if not call.document_states:
        return scan(plan, inputs, state, index)
    plan = plan._replace(group=1)
    inputs, index, places = documents.align(plan, inputs, index, state.shape[1])
    output, state = scan(plan, inputs, state, index)
    return take_tokens(output, places), state


def tokens_per_chunk(call: MatrixCall) -> int:
    """Tokens per chunk: as the caller asks, or a choice; for a short call no more than the next power of two.

    On a CPU 16 writes were fastest while a head's state fits beside its chunk in the inner cache, 32 beyond; 64 fill
    a tensor core (benchmarks/results).
    """
    small = call.k.shape[-1] * call.v.shape[-1] <= 64 * 64
    rows = (16 if small else 32) if jax.default_backend() == "cpu" else 64
    size, tokens = call.chunk_size or max(1, rows // call.writes), call.q.shape[1]
    return size if is_symbolic(tokens) else min(size, 1 << (tokens - 1).bit_length())


def _group_size(inputs: Inputs, size: int, writes: int) -> int:
    """Chunks per group: one on a CPU, whose cache holds little more; elsewhere as many as fill the device."""
    batch, _, heads, width = inputs.k.shape
    if jax.default_backend() == "cpu" or is_symbolic(batch, inputs.q.shape[1]):
        return 1
    chunks = -(-inputs.q.shape[1] // size)
    most = max(1, min(64, (1 << 24) // (batch * heads * size * writes * max(width, inputs.v.shape[-1]))))
    # Even groups, so that little of the last one is padding.
    return -(-chunks // -(-chunks // most))


def _scan_plain(plan: ChunkScan, inputs: Inputs, state: Array, index: Array | None) -> tuple[Array, Array]:
    return _scan_groups(plan, inputs, state, index, lambda residuals: None)[:2]


_scan_chunks = jax.custom_vjp(_scan_plain, nondiff_argnums=(0,))


def _scan_chunks_forward(plan, inputs, state, index):
    output, state, residuals = _scan_groups(plan, inputs, state, index, lambda residuals: residuals)
    return (output, state), (inputs, index, residuals)


def _scan_groups(plan: ChunkScan, inputs: Inputs, state: Array, index: Array | None, save: Callable[[Residuals], Any]):
    """Output, state, and what `save` keeps of each group for the backward pass.

    With states per document `index` is the document of each chunk [N, B], else the segment of each token [B, T].
    """
    batch, _, heads, width = inputs.v.shape
    length = inputs.q.shape[1]
    of_documents = state.ndim == 5
    flat, segments = groups.flatten(plan, inputs, None if of_documents else index)
    dtype = accumulation_dtype(inputs.q, inputs.k, inputs.v)

    def step(carry, at):
        state, output = carry
        i, segments, document = at
        group = groups.load_group(plan, flat, inputs, i, segments)
        last, new, residuals = _group_forward(plan, documents.take(state, document), *group)
        return (documents.put(state, document, last), groups.store(output, groups.to_time(new), i)), save(residuals)

    padded = flat.q.shape[1]
    output = vary_like(jnp.zeros((batch, padded, heads * width), dtype), state)
    places = jnp.arange(padded // plan.tokens, dtype=jnp.int32)
    (state, output), residuals = lax.scan(step, (state, output), (places, segments, index if of_documents else None))
    return output[:, :length].reshape(batch, length, heads, width), state, residuals


def _scan_chunks_backward(plan, saved, cotangents):
    inputs, index, residuals = saved
    d_output, d_state = cotangents
    batch, length, heads, width = d_output.shape
    of_documents = d_state.ndim == 5
    flat, segments = groups.flatten(plan, inputs, None if of_documents else index)
    d_output = pad_time(d_output.reshape(batch, length, -1), plan.tokens)

    def step(carry, at):
        d_state, d_inputs = carry
        i, segments, document, residuals = at
        group, masks = groups.load_group(plan, flat, inputs, i, segments)
        rows = groups.to_chunks(
            groups.load(d_output, i, plan.tokens).reshape(batch, plan.tokens, heads, width), plan.group
        )
        d_last = documents.take(d_state, document)
        d_first, d_group = _group_backward(plan, group, masks, residuals, rows, d_last)
        pairs = zip(d_inputs, d_group, strict=True)
        d_inputs = Inputs(
            *(None if x is None else groups.store(x, groups.to_time(d).astype(x.dtype), i) for x, d in pairs)
        )
        return (documents.put(d_state, document, d_first), d_inputs), None

    zeros = Inputs(*(None if x is None else vary_like(jnp.zeros(x.shape, x.dtype), d_state) for x in flat))
    places = jnp.arange(flat.q.shape[1] // plan.tokens, dtype=jnp.int32)
    along = (places, segments, index if of_documents else None, residuals)
    (d_state, d_inputs), _ = lax.scan(step, (d_state, zeros), along, reverse=True)
    pairs = zip(d_inputs, inputs, strict=True)
    d_inputs = Inputs(*(None if x is None else d[:, : x.shape[1]].reshape(x.shape) for d, x in pairs))
    return d_inputs, d_state, None


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)


def _make_features(plan: ChunkScan, inputs: Inputs, masks: Masks | None) -> Features:
    q, k = inputs.q * plan.scale, inputs.k
    w = None if inputs.beta is None else k if inputs.w is None else inputs.w
    decay = None if inputs.decay is None else cumulative_decay(inputs.decay)
    qk, wk = decayed_scores(q, k, w, decay, None if masks is None else masks.same, plan.precision)
    decay_in = decay_out = chunk_decay = None
    if decay is not None:
        decay_in, decay_out = jnp.exp(decay.total()), jnp.exp(decay_to_end(inputs.decay))
        chunk_decay = _transpose(decay_in[..., -1:, :])
    if masks is not None:
        pairs = zip(masks[1:], (decay_in, decay_out, chunk_decay), strict=True)
        decay_in, decay_out, chunk_decay = (mask if x is None else mask * x for mask, x in pairs)
    w_in = w if w is None or decay_in is None else w * repeat_tokens(decay_in, plan.writes)
    k_out = k if decay_out is None else k * repeat_tokens(decay_out, plan.writes)
    return Features(q if decay_in is None else q * decay_in, w_in, k_out, chunk_decay, qk, wk)


def _group_forward(plan: ChunkScan, state: Array, inputs: Inputs, masks) -> tuple[Array, Array, Residuals]:
    features = _make_features(plan, inputs, masks)
    inverse = z = None
    y = inputs.v
    if inputs.beta is not None:
        inverse = unit_lower_inverse(inputs.beta * features.wk)
        width = inputs.k.shape[-1]
        both = plan.product(inverse, _right_sides(inputs, features))
        z, y = both[..., :width], both[..., width:]

    def step(state, chunk):
        z, y, k_out, chunk_decay = chunk
        u = y if z is None else y - plan.product(z, state)
        decayed = state if chunk_decay is None else state * chunk_decay
        return decayed + plan.product(jnp.swapaxes(k_out, -1, -2), u), (u, state)

    last, (u, states) = lax.scan(step, state, (z, y, features.k_out, features.chunk_decay))
    output = plan.product(features.q_in, states) + plan.product(features.qk, u)
    return last, output, Residuals(inverse, u, states)


def _right_sides(inputs: Inputs, features: Features) -> Array:
    """diag(beta) exp(G) W and diag(alpha) V side by side."""
    if inputs.alpha is None:
        return inputs.beta * jnp.concatenate([features.w_in, inputs.v], axis=-1)
    return jnp.concatenate([inputs.beta * features.w_in, inputs.alpha * inputs.v], axis=-1)


def _group_backward(plan: ChunkScan, inputs: Inputs, masks, residuals: Residuals, d_output, d_state):
    """Gradients of the state before a group and of its inputs."""
    features, pull = jax.vjp(lambda inputs: _make_features(plan, inputs, masks), inputs)
    inverse, u, states = residuals
    z = None
    if inverse is not None:
        z = plan.product(inverse, inputs.beta * features.w_in)
    du_read = plan.product(_transpose(features.qk), d_output)
    d_state_read = plan.product(_transpose(features.q_in), d_output)

    def step(d_state, chunk):
        z, k_out, chunk_decay, du_read, d_state_read = chunk
        du = du_read + plan.product(k_out, d_state)
        before = (d_state if chunk_decay is None else d_state * chunk_decay) + d_state_read
        return before if z is None else before - plan.product(_transpose(z), du), (du, d_state)

    chunks = (z, features.k_out, features.chunk_decay, du_read, d_state_read)
    d_start, (du, d_ends) = lax.scan(step, d_state, chunks, reverse=True)

    d_chunk_decay = None
    if features.chunk_decay is not None:
        axes = [axis for axis, size in enumerate(features.chunk_decay.shape) if size == 1]
        d_chunk_decay = jnp.sum(d_ends * states, axis=axes, keepdims=True)
    d_features = Features(
        q_in=plan.product(d_output, _transpose(states)),
        w_in=None,
        k_out=plan.product(u, _transpose(d_ends)),
        chunk_decay=d_chunk_decay,
        qk=plan.product(d_output, _transpose(u)),
        wk=None,
    )
    if inverse is None:
        (d_inputs,) = pull(d_features)
        return d_start, d_inputs._replace(v=d_inputs.v + du)
    # U = X (diag(alpha) V - diag(beta) W_in S): d_right is the gradient of the right side, d_erased that of -beta W_in.
    d_right = plan.product(_transpose(inverse), du)
    d_a = -plan.product(d_right, _transpose(u))
    d_erased = plan.product(d_right, _transpose(states))
    d_features = d_features._replace(w_in=-inputs.beta * d_erased, wk=inputs.beta * d_a)
    (d_inputs,) = pull(d_features)
    d_alpha = jnp.sum(d_right * inputs.v, axis=-1, keepdims=True)
    d_carried = -jnp.sum(d_erased * features.w_in, axis=-1, keepdims=True)
    d_inside = jnp.sum(d_a * features.wk, axis=-1, keepdims=True)
    if inputs.alpha is None:
        d_beta = d_alpha + d_carried + d_inside
        return d_start, d_inputs._replace(v=d_inputs.v + inputs.beta * d_right, beta=d_inputs.beta + d_beta)
    v, alpha = d_inputs.v + inputs.alpha * d_right, d_inputs.alpha + d_alpha
    return d_start, d_inputs._replace(v=v, alpha=alpha, beta=d_inputs.beta + d_carried + d_inside)


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
