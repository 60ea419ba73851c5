"""DeltaFormer and softmax attention on Hopper: the arrays of a call laid out for parts.py and attention.py."""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel
from memformer.core.types import Array, Float
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.attention.forward import attend
from memformer.pallas.gpu.attention.tiles import TILE, Plan
from memformer.pallas.gpu.attention.write_parts import write
from memformer.pallas.gpu.common import interpreting, is_hopper
from memformer.pallas.mask import Sight, by_head, join, marks_of, sight_of

__all__ = ["attention", "deltaformer", "run"]


def _plan(
    op: str, kernel: Kernel, scale: float, arrays: tuple[Array, ...], held, sight: Sight, chunk_size, precision
) -> Plan:
    """Checks that the kernels serve this call, and cuts it.

    Args:
      op: name of the public function.
      kernel: the similarity kernel.
      scale: factor on inner products.
      arrays: q, k and the others of the call in bfloat16, v the last.
      held: keys and values of the state, or None.
      sight: segments.
      chunk_size: the caller's, or None.
      precision: of the products.

    Raises:
      NotImplementedError: not an sm_90 GPU; inputs that are not bfloat16; a precision above bfloat16 products; keys or
        values wider than the kernels hold; a chunk size that no kernel has.
    """
    else_chunked = "implementation='chunked' serves it"
    if not (interpreting() or is_hopper()):
        raise NotImplementedError(
            f"the {op} kernel needs an sm_90 GPU (or a trace for one under jax.sharding.use_abstract_mesh), and this"
            f" is {jax.default_backend()!r}; implementation='chunked' serves here"
        )
    if any(x.dtype != jnp.bfloat16 for x in arrays):
        found = ", ".join(str(x.dtype) for x in arrays)
        raise NotImplementedError(
            f"the {op} kernel takes bfloat16 queries, keys and values (its products are wgmma on bfloat16), got"
            f" {found}; {else_chunked}"
        )
    if precision != lax.Precision.DEFAULT:
        raise NotImplementedError(f"the {op} kernel has products at default precision only; {else_chunked}")
    key, value = arrays[1].shape[-1], arrays[-1].shape[-1]
    if max(key, value) > tuning.KEYS[-1]:
        raise NotImplementedError(
            f"the {op} kernel holds keys and values of at most {tuning.KEYS[-1]} channels, got {key} and {value};"
            f" {else_chunked}"
        )
    batch, length, heads = arrays[1].shape[:3]
    groups = 1 if length <= TILE else 2
    if chunk_size not in (None, TILE):
        raise NotImplementedError(f"the {op} kernel takes chunk_size {TILE}, got {chunk_size}; {else_chunked}")
    parts = -(-length // tuning.part(batch * heads))
    key, value = (next(width for width in tuning.KEYS if width >= x) for x in (key, value))
    size = groups * TILE
    return Plan(
        kernel=kernel,
        scale=scale,
        groups=groups,
        slots=tuning.SLOTS[1 if kernel.normalized else 2],
        key=key,
        value=value,
        block=min(value, tuning.WRITE_BLOCK),
        part=-(-length // (parts * size)) * size,
        before=0 if held is None else -(-held[0].shape[1] // size),
        own=True,
        strict=False,
        segments=sight.key is not None,
    )


def _widen(x: Array, width: int) -> Array:
    return pad_time(x, width, axis=3)


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
      chunk_size: rows of a tile, or None.
      precision: of the products.
      op: name of the public function, for messages.

    Returns:
      The output in bfloat16.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    plan = _plan(op, kernel, scale, (q, k, v), held, sight, chunk_size, precision)
    length, width = v.shape[1], v.shape[3]
    keys, values = (None, None) if held is None else (_widen(held[0], plan.key), _widen(held[1], plan.value))
    marks = marks_of(sight, plan.size) if plan.segments else ()
    k, q, v = _widen(k, plan.key), _widen(q, plan.key), _widen(v, plan.value)
    arrays = (join(keys, k, plan.size), by_head(q, plan.size), join(values, v, plan.size))
    k, q, x = (vary_like(y, *arrays, *marks) for y in arrays)
    return jnp.swapaxes(attend(plan, jnp.bfloat16, k, q, x, marks), 1, 2)[:, :length, :, :width]


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
    """DeltaFormer by Hopper kernels; arguments checked.

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
      chunk_size: rows of a tile, or None.
      precision: of the products.

    Returns:
      The output in bfloat16, and u in float32 (to 16 bits).

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    plan, read = (
        _plan("deltaformer", kernel, scale, (q, k, w, v), held, sight, chunk_size, precision)
        for kernel, scale in zip(kernels, scales, strict=True)
    )
    length, width = v.shape[1], v.shape[3]
    held_k, held_u = (None, None) if held is None else (_widen(held[0], plan.key), _widen(held[1], plan.value))
    marks = marks_of(sight, plan.size, plan.part) if plan.segments else ()
    q, k, w = (_widen(x, plan.key) for x in (q, k, w))
    k = join(held_k, k, plan.size, plan.part)
    v = _widen(v, plan.value)
    start = jnp.zeros((k.shape[0], k.shape[1], 0, plan.value), jnp.float32)
    start = start if held_u is None else by_head(held_u, plan.size).astype(jnp.float32)
    alpha, beta = alpha.astype(jnp.float32), beta.astype(jnp.float32)
    q, w, v, alpha, beta = (by_head(x, plan.part) for x in (q, w, v, alpha, beta))
    arrays = (k, w, v, alpha, beta, start, q)
    k, w, v, alpha, beta, start, q = (vary_like(x, *arrays, *marks) for x in arrays)
    u = write(plan, k, w, v, alpha, beta, start, marks)
    everything = u if held_u is None else jnp.concatenate([start, u], axis=2)
    o = attend(read, jnp.bfloat16, k, q, everything, marks)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length, :, :width] for x in (o, u))


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
