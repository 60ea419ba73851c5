"""What the ops with a matrix state share: checked arguments in one form, and the recurrence."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.checks import check_array, check_multiple, check_positive
from memformer.core.numerics import accumulation_dtype, matmul_precision, repeat_heads
from memformer.core.segments import Segments, find_segments
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Dims, Float

__all__ = ["Memory", "check_memory", "recurrence", "spread_heads"]

GROUPS = "value heads must be a multiple of query and key heads"


class Memory(NamedTuple):
    """The arguments of an op with a matrix state, checked, in one form for all of them.

    M is the number of writes a token (1 except in delta_product). Padding has q, k, v, beta and decay 0, so
    that it neither reads nor writes nor forgets.

    Attributes:
      q: [B, T, G, K], or H heads (`spread_heads`).
      k: [B, T, M, G, K] alike.
      v: [B, T, M, H, V].
      beta: [B, T, M, H], or None where writes add instead of replace.
      decay: log decay [B, T, H, 1] or [B, T, H, K], or None.
      segments: from `find_segments`, or None.
      state: [B, H, K, V] in the accumulation dtype, or None for zeros.
    """

    q: Array
    k: Array
    v: Array
    beta: Array | None
    decay: Array | None
    segments: Segments | None
    state: Array | None


def check_memory(
    q, k, v, beta, *, decay, segment_ids, initial_state, chunk_size, steps=False, columns=0
) -> tuple[Memory, Dims]:
    """Checks what the caller gave and brings it to one form.

    Args:
      q, k, v, beta, decay, segment_ids, initial_state, chunk_size: as the op has them; beta None where it has none.
      steps: True where k, v and beta have an axis of writes after time.
      columns: value columns that the state has beyond V.

    Raises:
      ValueError: names the argument.
    """
    dims: Dims = {}
    many = "N " if steps else ""
    q = check_array("q", q, "B T G K", dims)
    k = check_array("k", k, f"B T {many}G K", dims)
    v = check_array("v", v, f"B T {many}H V", dims)
    check_multiple("H", "G", dims, GROUPS)
    if beta is not None:
        beta = check_array("beta", beta, f"B T {many}H", dims)
    if decay is not None:
        per_channel = getattr(decay, "ndim", 3) == 4
        decay = check_array("decay", decay, "B T H K" if per_channel else "B T H", dims)
        decay = decay if per_channel else decay[..., None]
    if initial_state is not None:
        state_dims = dims | {"V": dims["V"] + columns}
        initial_state = check_array("initial_state", initial_state, "B H K V", state_dims)
        initial_state = initial_state.astype(accumulation_dtype(q, k, v))
    segments = find_segments(segment_ids, dims)
    check_positive("chunk_size", chunk_size)
    if not steps:
        k, v = k[:, :, None], v[:, :, None]
        beta = None if beta is None else beta[:, :, None]
    memory = Memory(q, k, v, beta, decay, segments, initial_state)
    return _clear_padding(memory), dims


def spread_heads(memory: Memory) -> Memory:
    """Repeats query and key heads that several value heads share."""
    groups = memory.v.shape[3] // memory.q.shape[2]
    if groups == 1:
        return memory
    return memory._replace(q=repeat_heads(memory.q, groups), k=jnp.repeat(memory.k, groups, axis=3))


def _clear_padding(memory: Memory) -> Memory:
    if memory.segments is None:
        return memory
    valid = memory.segments.valid

    def clear(x):
        if x is None:
            return None
        mask = lax.expand_dims(valid, range(2, x.ndim))
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    cleared = {name: clear(getattr(memory, name)) for name in ("q", "k", "v", "beta", "decay")}
    return memory._replace(**cleared)


def zero_state(memory: Memory) -> Array:
    """[B, H, K, V] zeros in the accumulation dtype."""
    batch, _, heads, width = memory.q.shape
    zeros = jnp.zeros((batch, heads, width, memory.v.shape[-1]), accumulation_dtype(memory.q, memory.k, memory.v))
    return vary_like(zeros, memory.q, memory.k, memory.v, memory.beta, memory.decay)


def resolve_scale(scale: float | None, width: int) -> float:
    """K^-0.5 where the caller gave none."""
    return 1.0 / math.sqrt(width) if scale is None else scale


def recurrence(memory: Memory, scale: float, precision=None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """One token at a time with lax.scan: the oracle, and the fastest form for a few tokens.

    Args:
      memory: checked arguments.
      scale: factor on the read.
      precision: of the products.

    Returns:
      The output in the accumulation dtype, and the state.
    """
    memory = spread_heads(memory)
    dtype = accumulation_dtype(memory.q, memory.k, memory.v)
    precision = matmul_precision(precision, memory.q, memory.k, memory.v)
    reset = None
    if memory.segments is not None:
        reset = jnp.diff(memory.segments.index, axis=1, prepend=jnp.zeros_like(memory.segments.index[:, :1])) != 0
    inputs: tuple[Array, ...] = (memory.q, memory.k, memory.v, memory.beta, memory.decay, reset)
    inputs = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in inputs)

    def write(state, k, v, beta):
        if beta is not None:
            stored = jnp.einsum("bhk,bhkv->bhv", k, state, precision=precision)
            v = beta[..., None] * (v - stored)
        return state + k[..., :, None] * v[..., None, :]

    def step(state, inputs):
        q, k, v, beta, decay, reset = (None if x is None else x for x in inputs)
        q, k, v, beta, decay = (None if x is None else x.astype(dtype) for x in (q, k, v, beta, decay))
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], jnp.zeros_like(state), state)
        if decay is not None:
            state = state * jnp.exp(decay)[..., None]
        for n in range(k.shape[1]):
            state = write(state, k[:, n], v[:, n], None if beta is None else beta[:, n])
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision=precision)

    start = zero_state(memory) if memory.state is None else memory.state
    state, output = lax.scan(step, start, inputs)
    return jnp.moveaxis(output, 0, 1), state
