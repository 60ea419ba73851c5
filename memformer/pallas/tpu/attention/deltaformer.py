"""DeltaFormer and softmax attention on TPU: the arrays of a call laid out for write.py and attention.py."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Float
from memformer.pallas.mask import Sight, by_head, join, marks_of, sight_of
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention.forward import attend
from memformer.pallas.tpu.attention.tiles import Plan
from memformer.pallas.tpu.attention.write import write
from memformer.pallas.tpu.common import PASSES, check_backend

__all__ = ["attention", "deltaformer", "run"]


def _plan(op: str, kernel: Kernel, scale: float, k: Array, v: Array, held: int, segments: bool, chunk_size, precision):
    """Checks that the kernels serve this call, and cuts it.

    Raises:
      NotImplementedError: not a TPU; float64; a chunk size that no kernel has.
    """
    kind = check_backend(op, k, v)
    passes = PASSES[precision]
    itemsize = 2 if passes == 1 else 4
    try:
        cut = tuning.choose_tiles(kind, k.shape[1], k.shape[3], v.shape[3], itemsize, chunk_size)
    except ValueError as error:
        raise NotImplementedError(f"the {op} kernel cannot cut this call: {error}") from None
    size, sub, tile, back, most = cut
    before = -(-held // size)
    return Plan(kernel, scale, size, sub, tile, back, most, before, True, False, segments, passes)


def _marks(plan: Plan, sight: Sight) -> tuple[Array, ...]:
    """Segments of queries and of all slots, where there are any."""
    return marks_of(sight, plan.size) if plan.segments else ()


def _operand(plan: Plan, x: Array) -> Array:
    """x as products of scores take it."""
    return x.astype(jnp.bfloat16 if plan.passes == 1 else jnp.float32)


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    kernel: Kernel,
    scale: float,
    sight: Sight,
    held: tuple[Array, Array] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
    op: str = "softmax_attention",
) -> Float[Array, "B T H V"]:
    """Reads v, and what the state holds, at the queries; each sees slots up to its own.

    Args:
      q: queries.
      k: keys.
      v: values.
      kernel: the similarity kernel.
      scale: factor on inner products.
      sight: segments.
      held: keys and values of the state, [B, S, G, K] and [B, S, G, V], or None.
      chunk_size: rows of a block, or None.
      precision: of the products.
      op: name of the public function, for messages.

    Returns:
      The output, bfloat16 where v is and one pass is asked for, else float32.

    Raises:
      NotImplementedError: not a TPU; float64; a chunk size that no kernel has.
    """
    slots = 0 if held is None else held[0].shape[1]
    plan = _plan(op, kernel, scale, k, v, slots, sight.key is not None, chunk_size, precision)
    keys, values = (None, None) if held is None else held
    marks = _marks(plan, sight)
    arrays = [
        join(keys, _operand(plan, k), plan.size),
        by_head(_operand(plan, q), plan.size),
        join(values, v, plan.size),
    ]
    arrays = [vary_like(x, *arrays, *marks) for x in arrays]
    dtype = jnp.bfloat16 if v.dtype == jnp.bfloat16 and plan.passes == 1 else jnp.float32
    o = attend(plan, dtype, *arrays, marks)
    return jnp.swapaxes(o, 1, 2)[:, : q.shape[1]]


def deltaformer(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    w: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    alpha: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    *,
    kernels: tuple[Kernel, Kernel],
    scales: tuple[float, float],
    sight: Sight,
    held: tuple[Array, Array] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """DeltaFormer by TPU kernels; arguments checked.

    Args:
      q: queries.
      k: keys.
      w: what is erased before a write.
      v: values.
      alpha: strength of the write.
      beta: strength of the erasure.
      kernels: of the write and of the read.
      scales: theirs.
      sight: segments.
      held: keys and u of the state, [B, S, G, K] and [B, S, G, V], or None.
      chunk_size: rows of a block, or None.
      precision: of the products; the triangular solve runs at HIGH at least.

    Returns:
      The output in float32 or bfloat16, and u in float32.

    Raises:
      NotImplementedError: not a TPU; float64; a chunk size that no kernel has.
    """
    length, slots = k.shape[1], 0 if held is None else held[0].shape[1]
    shared = (k, v, slots, sight.key is not None, chunk_size, precision)
    plan = _plan("deltaformer", kernels[0], scales[0], *shared)
    held_k, held_u = (None, None) if held is None else held
    marks = _marks(plan, sight)
    k = join(held_k, _operand(plan, k), plan.size)
    batch, groups = k.shape[0], k.shape[1]
    start = jnp.zeros((batch, groups, 0, v.shape[3]), jnp.float32)
    start = start if held_u is None else by_head(held_u, plan.size).astype(jnp.float32)
    q, w, v, alpha, beta = (
        by_head(x, plan.size)
        for x in (_operand(plan, q), _operand(plan, w), v, alpha.astype("float32"), beta.astype("float32"))
    )
    arrays = (k, w, v, alpha, beta, start, q)
    k, w, v, alpha, beta, start, q = (vary_like(x, *arrays, *marks) for x in arrays)
    u = write(plan, k, w, v, alpha, beta, start, marks)
    read = dataclasses.replace(plan, kernel=kernels[1], scale=scales[1])
    everything = u if held_u is None else jnp.concatenate([start, u], axis=2)
    dtype = jnp.bfloat16 if v.dtype == jnp.bfloat16 and plan.passes == 1 else jnp.float32
    o = attend(read, dtype, k, q, everything, marks)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length] for x in (o, u))


def run(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs a call of DeltaFormer; w, alpha and beta are arrays."""
    kernels = (call.write_kernel, call.read_kernel)
    return deltaformer(
        call.q,
        call.k,
        call.w,
        call.v,
        call.alpha,
        call.beta,
        kernels=kernels,
        scales=tuple(kernel.scale for kernel in kernels),
        sight=sight_of(call.mask),
        held=None if call.cache is None else (call.cache.k, call.cache.values),
        chunk_size=call.chunk_size,
        precision=call.precision,
    )
