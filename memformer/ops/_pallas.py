"""Entries of the Pallas kernels, until memformer.pallas has them."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from memformer.core.calls import AttentionCall, MatrixCall
from memformer.core.types import Array

__all__ = ["deltaformer", "matrix_memory", "preferred", "softmax_attention"]


def preferred(tokens: int, few: int = 4, library: str | None = None) -> tuple[str, ...]:
    """Implementations in the order in which None tries them.

    The recurrence up to `few` tokens. Kernels on a TPU and on an sm_90 GPU, if one device runs the call or a mesh
    (jax.set_mesh) says how to split it: the compiler cannot split a kernel.

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
        if platform in ("gpu", "cuda") and importlib.import_module("memformer.pallas.gpu.common").is_hopper():
            return (*(() if library is None else (library,)), "pallas", "chunked", "recurrent")
    return ("chunked", "recurrent")


def matrix_memory(call: MatrixCall) -> tuple[Array, Array]:
    """Runs a matrix memory by the kernels of this machine's accelerator."""
    call.require_delta_write("pallas")
    family = f"memformer.pallas.{_family()}.matrix_memory"
    q, decay, writes = call.q, call.decay, call.writes
    index = None if call.segments is None else call.segments.index
    if writes > 1:
        # Every write becomes a token; the last of them reads, the first forgets.
        q = _at(q, writes, writes - 1)
        decay = None if decay is None else _at(decay, writes, 0)
        index = None if index is None else jnp.repeat(index, writes, axis=1)
    options: dict[str, Any] = {"decay": decay, "scale": call.scale, "index": index, "state": call.state}
    options |= {"chunk_size": call.chunk_size, "precision": call.precision}
    if call.beta is None:
        return importlib.import_module(f"{family}.linear_attention").linear_attention(q, call.k, call.v, **options)
    rule = importlib.import_module(f"{family}.delta_rule").delta_rule
    output, state = rule(q, call.k, call.v, call.beta, op=call.op, **options)
    return output[:, writes - 1 :: writes], state


def softmax_attention(call: AttentionCall) -> Array:
    """Runs softmax attention by the kernels of this machine's accelerator."""
    if call.window is not None or not call.causal:
        raise NotImplementedError(
            "the softmax_attention kernel is causal and has no window; implementation='chunked' serves both"
        )
    options: dict[str, Any] = {"kernel": call.read_kernel, "scale": call.read_kernel.scale, **_shared(call)}
    return _attention().attention(call.q, call.k, call.v, **options)


def deltaformer(call: AttentionCall) -> tuple[Array, Array]:
    """Runs DeltaFormer by the kernels of this machine's accelerator."""
    one = jnp.ones(call.k.shape[:3], jnp.float32)
    w, alpha, beta = (x if x is not None else y for x, y in ((call.w, call.k), (call.alpha, one), (call.beta, one)))
    kernels: Any = (call.write_kernel, call.read_kernel)
    options: dict[str, Any] = {"kernels": kernels, "scales": tuple(x.scale for x in kernels), **_shared(call)}
    return _attention().deltaformer(call.q, call.k, w, call.v, alpha, beta, **options)


def _shared(call: AttentionCall) -> dict[str, Any]:
    sight = importlib.import_module("memformer.pallas.mask").Sight
    return {
        "sight": sight(call.mask.cache_segment, call.mask.key_segment, call.mask.query_segment),
        "held": None if call.cache is None else (call.cache.k, call.cache.values),
        "chunk_size": call.chunk_size,
        "precision": call.precision,
    }


def _family() -> str:
    """gpu, or tpu where this machine has no accelerator."""
    return "gpu" if importlib.import_module("memformer.pallas.gpu.common").for_gpu() else "tpu"


def _attention():
    return importlib.import_module(f"memformer.pallas.{_family()}.attention.deltaformer")


def _at(x: Array, writes: int, place: int) -> Array:
    """[B, T, ...] to [B, T * writes, ...]: x at one write of every token, 0 at the others."""
    wide = jnp.zeros((*x.shape[:2], writes, *x.shape[2:]), x.dtype)
    return wide.at[:, :, place].set(x).reshape(x.shape[0], -1, *x.shape[2:])
