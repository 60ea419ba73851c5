"""The recurrent form of the matrix memories: the reference, and the fastest form for a few tokens."""

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.numerics import repeat_heads
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory import documents

__all__ = ["run"]


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Array]:
    """Runs a matrix memory one token at a time, in a scan.

    Returns:
      The output in the accumulation dtype, and the state.
    """
    dtype, precision = call.state.dtype, call.precision
    repeats = call.v.shape[2] // call.q.shape[2]

    def by_time(x):
        """[B, T N, ...] to [T, B, N, ...]."""
        return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], -1, call.writes, *x.shape[2:]), 1, 0)

    q, k, w = (None if x is None else repeat_heads(x, repeats) for x in (call.q, call.k, call.w))
    decay, reset, document = call.decay, None, None
    if decay is not None:
        decay = jnp.moveaxis(decay if call.decay_per_channel else decay[..., None], 1, 0)
    if call.document_states:
        index = jnp.zeros(q.shape[:2], jnp.int32) if call.segments is None else call.segments.index
        document = jnp.moveaxis(index, 1, 0)
    elif call.segments is not None:
        reset = jnp.diff(call.segments.index, axis=1, prepend=jnp.zeros_like(call.segments.index[:, :1])) != 0
        reset = jnp.moveaxis(reset, 1, 0)
    inputs = (jnp.moveaxis(q, 1, 0), by_time(k), by_time(call.v), by_time(w), by_time(call.alpha), by_time(call.beta))

    def write(state, k, v, w, alpha, beta):
        if beta is not None:
            stored = jnp.einsum("bhk,bhkv->bhv", k if w is None else w, state, precision=precision)
            v = beta[..., None] * (v - stored) if alpha is None else alpha[..., None] * v - beta[..., None] * stored
        return state + k[..., :, None] * v[..., None, :]

    def step(states, inputs):
        *arrays, reset, document = inputs
        state = documents.take(states, document)
        q, *writes, decay = (None if x is None else x.astype(dtype) for x in arrays)
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], jnp.zeros_like(state), state)
        if decay is not None:
            state = state * jnp.exp(decay)[..., None]
        for n in range(call.writes):
            state = write(state, *(None if x is None else x[:, n] for x in writes))
        output = call.scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision=precision)
        return documents.put(states, document, state), output

    state, output = lax.scan(step, call.state, (*inputs, decay, reset, document))
    return jnp.moveaxis(output, 0, 1), state
