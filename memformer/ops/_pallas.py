"""The Pallas kernels behind the ops."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from memformer.core.numerics import matmul_precision
from memformer.core.types import Array, Float
from memformer.ops.attention.cache import Cache, Timeline
from memformer.ops.attention.recurrent import Reading
from memformer.ops.matrix_memory.arguments import Memory

__all__ = ["attention_kernel", "deltaformer_kernel", "kernel", "preference"]


def preference(tokens: int, few: int = 4, library: str | None = None) -> tuple[str, ...]:
    """Implementations in the order in which None tries them.

    The recurrence up to `few` tokens, where chunks have nothing to gain. Kernels on a TPU and on an sm_90 GPU, if one
    device runs the call or a mesh (jax.set_mesh) says how to split it: the compiler cannot split a kernel.

    Args:
      tokens: of the call.
      few: up to so many take the recurrence.
      library: what goes before our own kernels on that GPU.
    """
    if tokens <= few:
        return ("recurrent", "chunked")
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if not mesh.empty or jax.device_count() == 1:
        if platform == "tpu":
            return ("pallas", "chunked", "recurrent")
        if platform in ("gpu", "cuda") and _on_hopper():
            return (*(() if library is None else (library,)), "pallas", "chunked", "recurrent")
    return ("chunked", "recurrent")


def _on_hopper() -> bool:
    # Imported late, so that `import memformer` stays quick.
    from memformer.pallas.gpu.common import is_hopper

    return is_hopper()


def kernel(
    op: str, memory: Memory, scale: float, chunk_size: int | None, precision=None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a memory by the kernels of this machine's accelerator.

    Args:
      op: name for messages.
      memory: checked arguments.
      scale: factor on the read.
      chunk_size: rows of keys a chunk, or None.
      precision: of the products.

    Returns:
      The output in float32, or bfloat16 where q, k and v are, and the state.

    Raises:
      NotImplementedError: no kernel serves the call, or the machine.
    """
    delta_rule, linear_attention = _kernels()
    q, k, v, beta, decay, segments, state = memory
    writes = k.shape[2]
    precision = matmul_precision(precision, q, k, v)
    index = None if segments is None else segments.index
    if decay is not None and decay.shape[-1] == 1:
        decay = decay[..., 0]
    if writes > 1:
        # Every write becomes a token; the last of them reads, the first forgets.
        q = _at(q, writes, writes - 1)
        decay = None if decay is None else _at(decay, writes, 0)
        index = None if index is None else jnp.repeat(index, writes, axis=1)
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    options: dict[str, Any] = {"decay": decay, "scale": scale, "index": index, "state": state, "chunk_size": chunk_size}
    if beta is None:
        return linear_attention(q, k, v, precision=precision, **options)
    beta = beta.reshape(beta.shape[0], -1, beta.shape[3])
    output, state = delta_rule(q, k, v, beta, precision=precision, op=op, **options)
    return output[:, writes - 1 :: writes], state


def attention_kernel(
    reading: Reading, timeline: Timeline, cache: Cache | None, q: Array, k: Array, v: Array
) -> Float[Array, "B T H V"]:
    """Runs softmax attention by the kernels of this machine's accelerator.

    Raises:
      NotImplementedError: a window; an encoder; no kernel serves the call, or the machine.
    """
    if reading.window is not None or not reading.causal:
        raise NotImplementedError(
            "the softmax_attention kernel is causal and has no window; implementation='chunked' serves both"
        )
    from memformer.pallas.mask import Sight

    return _attention_kernels().attention(
        q,
        k,
        v,
        kernel=reading.kernel,
        scale=reading.scale,
        sight=Sight(timeline.held_segment, timeline.key_segment, timeline.query_segment),
        held=None if cache is None else (cache.k, cache.values),
        chunk_size=reading.chunk_size,
        precision=reading.precision,
    )


def deltaformer_kernel(
    readings: tuple[Reading, Reading],
    timeline: Timeline,
    cache: Cache | None,
    inputs: tuple[Array, ...],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer by the kernels of this machine's accelerator.

    Args:
      readings: of the write and of the read.
      timeline: who sees whom.
      cache: the state.
      inputs: q, k, w, v, alpha and beta.

    Returns:
      The output in float32 or bfloat16, and u.

    Raises:
      NotImplementedError: no kernel serves the call, or the machine.
    """
    from memformer.pallas.mask import Sight

    write, read = readings
    return _attention_kernels().deltaformer(
        *inputs,
        kernels=(write.kernel, read.kernel),
        scales=(write.scale, read.scale),
        sight=Sight(timeline.held_segment, timeline.key_segment, timeline.query_segment),
        held=None if cache is None else (cache.k, cache.values),
        chunk_size=write.chunk_size,
        precision=write.precision,
    )


def _kernels():
    """The kernels of the delta rule and of linear attention for this machine; a TPU's where it has no accelerator."""
    # Imported late, so that `import memformer` stays quick.
    from memformer.pallas.gpu.common import for_gpu

    if for_gpu():
        from memformer.pallas.gpu.matrix_memory.delta_rule import delta_rule
        from memformer.pallas.gpu.matrix_memory.linear_attention import linear_attention
    else:
        from memformer.pallas.tpu.matrix_memory.delta_rule import delta_rule
        from memformer.pallas.tpu.matrix_memory.linear_attention import linear_attention
    return delta_rule, linear_attention


def _attention_kernels():
    """The module of the kernels of attention and DeltaFormer for this machine; a TPU's where it has no accelerator."""
    from memformer.pallas.gpu.common import for_gpu

    return importlib.import_module(f"memformer.pallas.{'gpu' if for_gpu() else 'tpu'}.deltaformer")


def _at(x: Array, writes: int, place: int) -> Array:
    """[B, T, ...] to [B, T * writes, ...]: x at one write of every token, 0 at the others."""
    wide = jnp.zeros((*x.shape[:2], writes, *x.shape[2:]), x.dtype)
    return wide.at[:, :, place].set(x).reshape(x.shape[0], -1, *x.shape[2:])
