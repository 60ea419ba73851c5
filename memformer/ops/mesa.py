"""Mesa: a matrix memory whose read solves, for every query, the least squares problem of all writes so far."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.checks import check, check_array, check_size
from memformer.core.context import refuse_sharded_time
from memformer.core.dispatch import dispatch
from memformer.core.sharding import keep_shardings, vary_like
from memformer.core.symbolic import padding_to
from memformer.core.types import Array, Dims, Float, Int
from memformer.ops.matrix_memory.arguments import make_call
from memformer.ops.matrix_memory.chunked import tokens_per_chunk
from memformer.ops.matrix_memory.chunks import by_time, load_chunks, refuse_kernel, resets, split_chunks, unsplit_chunks
from memformer.pallas.platform import preferred

__all__ = ["MesaState", "mesa"]


class MesaState(NamedTuple):
    """State of `mesa`.

    Attributes:
      keys: decayed sums of beta k k^T, in float32 (float64 for float64 inputs).
      values: decayed sums of beta k v^T, likewise.

    Example:
      >>> MesaState(keys=jnp.zeros((1, 2, 8, 8)), values=jnp.zeros((1, 2, 8, 4))).values.shape
      (1, 2, 8, 4)
    """

    keys: Float[Array, "B H K K"]
    values: Float[Array, "B H K V"]


@dataclasses.dataclass(frozen=True, eq=False)
class MesaCall(MatrixCall):
    """A call of mesa; `state` is keys beside values [B, H, K, K + V].

    Attributes:
      ridge: [B, T, H, K], 1 for padding.
      iterations: of conjugate gradients.
    """

    ridge: Array
    iterations: int


@keep_shardings
def mesa(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    ridge: Float[Array, "B T H K"],
    *,
    decay: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: MesaState | None = None,
    iterations: int = 30,
    chunk_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], MesaState]:
    """Adds each value at its key, and reads with the linear map that fits all writes so far in the least squares sense.

        G_t = exp(decay_t) G_{t-1} + beta_t k_t k_t^T
        S_t = exp(decay_t) S_{t-1} + beta_t k_t v_t^T
        o_t = scale S_t^T (G_t + diag(ridge_t))^-1 q_t

    The map M = S^T (G + diag(ridge))^-1 minimises the sum over all writes of beta exp(decay since then) |v - M k|^2
    plus the penalty ridge on the squares of M's columns. "recurrent" solves by elimination, "chunked" by conjugate
    gradients, for all tokens at once. Gradients are those of the exact solution.

    Args:
      q: queries. G may be less than the number of value heads H; query and key head g then serves the H / G value
        heads from g H / G on.
      k: keys.
      v: values.
      beta: write strength, at least 0.
      ridge: regularisation per key channel, above 0.
      decay: log decay (at most 0) of the state before each token; None is 0.
      scale: factor on the read; None is 1.
      segment_ids, chunk_size, precision: see `memformer.ops`.
      initial_state: of an earlier call; None is empty. Of its keys the symmetric part counts.
      iterations: of conjugate gradients in "chunked"; more are needed where ridge is small beside the sum of beta.
      implementation: None, "recurrent" or "chunked"; see `memformer.ops`. "pallas" raises: there is no kernel.

    Returns:
      The output in v's dtype, and the state.

    Raises:
      ValueError, NotImplementedError: see `memformer.ops`; also NotImplementedError where time is divided over devices.

    Source: arXiv 2506.05233 (MesaNet), equations of section 3.

    Example:
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> output, state = mesa(x, x, x, x[..., 0], x)
      >>> jnp.round(12 * output[0, :, 0, 0]), state.keys[0, 0, 0, 0]
      (Array([6., 8., 9.], dtype=float32), Array(3., dtype=float32))
    """
    dims: Dims = {}
    for name, x, letters in (("q", q, "B T G K"), ("k", k, "B T G K"), ("v", v, "B T H V"), ("beta", beta, "B T H")):
        check_array(name, x, letters, dims)
    ridge = check_array("ridge", ridge, "B T H K", dims)
    if decay is not None:
        check_array("decay", decay, "B T H", dims)
    iterations = check_size("iterations", iterations)
    call = make_call(
        "mesa",
        q,
        k,
        v,
        beta,
        decay=decay,
        scale=1.0 if scale is None else scale,
        segment_ids=segment_ids,
        initial_state=None,
        chunk_size=chunk_size,
        precision=precision,
    )
    refuse_sharded_time(call.op, dims["T"])
    if call.segments is not None:
        ridge = jnp.where(call.segments.valid[..., None, None], ridge, jnp.ones((), ridge.dtype))
    state = _start(initial_state, dims, call.state)
    whole = MesaCall(**vars(call) | {"state": state}, ridge=ridge, iterations=iterations)
    prefer = tuple(name for name in preferred(dims["T"]) if name != "pallas")
    output, state = dispatch(whole, implementation, IMPLEMENTATIONS, prefer)
    width = dims["K"]
    return output.astype(call.v.dtype), MesaState(state[..., :width], state[..., width:])


def _start(state: MesaState | None, dims: Dims, empty: Array) -> Array:
    """The checked state to start from, keys beside values."""
    if state is None:
        keys = jnp.zeros((*empty.shape[:3], empty.shape[2]), empty.dtype)
        return vary_like(jnp.concatenate([keys, empty], axis=-1), empty)
    check(isinstance(state, MesaState), "initial_state", "a MesaState", type(state).__name__)
    keys = check_array("initial_state.keys", state.keys, "B H K K", dims).astype(empty.dtype)
    values = check_array("initial_state.values", state.values, "B H K V", dims).astype(empty.dtype)
    return jnp.concatenate([(keys + jnp.swapaxes(keys, -1, -2)) / 2, values], axis=-1)


def _eliminate(a: Array, b: Array) -> Array:
    """Solves a x = b for symmetric positive definite a [..., K, K], which needs no pivots; b is [..., K]."""

    def step(i, whole):
        row = lax.dynamic_index_in_dim(whole, i, axis=-2)
        row = row / lax.dynamic_index_in_dim(row, i, axis=-1)
        column = lax.dynamic_index_in_dim(whole, i, axis=-1)
        own = lax.broadcasted_iota(jnp.int32, whole.shape, whole.ndim - 2) == i
        return jnp.where(own, row, whole - column * row)

    return lax.fori_loop(0, a.shape[-1], step, jnp.concatenate([a, b[..., None]], axis=-1))[..., -1]


def _conjugate_gradients(apply, b: Array, iterations: int) -> Array:
    """Solves apply(x) = b, one symmetric positive definite system per row of the last axis."""

    def dot(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    def divide(x, y):
        # a residual of 0 is the solution: there is nothing to add
        found = y > 0
        return jnp.where(found, x / jnp.where(found, y, 1), 0)

    def step(_, carry):
        x, residual, direction, norm = carry
        moved = apply(direction)
        size = divide(norm, dot(direction, moved))
        residual = residual - size * moved
        after = dot(residual, residual)
        return x + size * direction, residual, residual + divide(after, norm) * direction, after

    return lax.fori_loop(0, iterations, step, (jnp.zeros_like(b), b, b, dot(b, b)))[0]


def _run_recurrent(call: MesaCall) -> tuple[Array, Array]:
    dtype, width = call.state.dtype, call.state.shape[2]
    repeats = call.v.shape[2] // call.q.shape[2]
    decay = None if call.decay is None else by_time(call.decay)
    keys = (by_time(call.q, repeats), by_time(call.k, repeats))
    arrays = (*keys, by_time(call.v), by_time(call.beta), by_time(call.ridge), decay)

    def step(state, token):
        *arrays, reset = token
        q, k, v, beta, ridge, decay = (None if x is None else x.astype(dtype) for x in arrays)
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], jnp.zeros_like(state), state)
        if decay is not None:
            state = state * jnp.exp(decay)[..., None, None]
        written = jnp.concatenate([k, v], axis=-1)
        state = state + (beta[..., None] * k)[..., :, None] * written[..., None, :]
        a = state[..., :width] + ridge[..., None] * jnp.eye(width, dtype=dtype)[None, None]

        def apply(x):
            return jnp.einsum("bhij,bhj->bhi", a, x, precision=call.precision)

        x = lax.custom_linear_solve(apply, q, lambda _, b: _eliminate(a, b), symmetric=True)
        return state, call.scale * jnp.einsum("bhk,bhkv->bhv", x, state[..., width:], precision=call.precision)

    inputs = tuple(None if x is None else vary_like(x, call.state) for x in arrays)
    state = vary_like(call.state, *inputs)
    state, output = lax.scan(step, state, (*inputs, resets(call)))
    return jnp.moveaxis(output, 0, 1), state


def _run_chunked(call: MesaCall) -> tuple[Array, Array]:
    """The states at the starts of all chunks, then the systems of all tokens together."""
    tokens, width = call.q.shape[1], call.state.shape[2]
    size = tokens_per_chunk(call)
    chunks = load_chunks(call, size)
    beta = chunks.beta
    ridge = jnp.pad(call.ridge, ((0, 0), (0, padding_to(tokens, size)), (0, 0), (0, 0)), constant_values=1)
    ridge = split_chunks(ridge, size, call.state)

    def product(a, b):
        return jnp.matmul(a, b, precision=call.precision)

    written = jnp.concatenate([chunks.k, chunks.v], axis=-1)
    added = product(jnp.swapaxes(chunks.k * beta * chunks.decay_out, -1, -2), written)
    added, decay = (vary_like(x, call.state) for x in (added, chunks.chunk_decay))

    def step(state, chunk):
        added, decay = chunk
        return state * decay + added, state

    end, starts = lax.scan(step, vary_like(call.state, added), (added, decay))
    pairs = chunks.pairs * jnp.swapaxes(beta, -1, -2)
    keys = jnp.swapaxes(chunks.k, -1, -2)

    def read(x, start, own):
        return product(x * chunks.decay_in, start) + product(product(x, keys) * pairs, own)

    def apply(x):
        return read(x, starts[..., :width], chunks.k) + ridge * x

    def solve(_, b):
        return _conjugate_gradients(apply, b, call.iterations)

    q = vary_like(chunks.q, starts, ridge, pairs)
    x = lax.custom_linear_solve(apply, q, solve, symmetric=True)
    output = call.scale * read(x, starts[..., width:], chunks.v)
    return unsplit_chunks(output, tokens), end


IMPLEMENTATIONS = {"recurrent": _run_recurrent, "chunked": _run_chunked, "pallas": refuse_kernel}
