"""Softmax attention and DeltaFormer by Pallas kernels: one entry for every chip."""

import dataclasses

import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.numerics import accumulation_dtype, repeat_heads
from memformer.core.types import Array, Float
from memformer.pallas.cache_decoding import CacheRead, CacheSums
from memformer.pallas.platform import chip
from memformer.pallas.sharding import key_head_repeats

__all__ = ["CacheRead", "CacheSums", "decode", "deltaformer", "softmax_attention"]


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention by the kernels of the chip that this trace is for; a TPU's where it is for none.

    Returns:
      The output in float32, or bfloat16 where v is.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip.
    """
    # Imported late: the kernels of the other chip, and Pallas itself where no kernel is asked for, are never loaded.
    if chip() == "gpu":
        from memformer.pallas.gpu.attention.softmax_attention import run
    else:
        from memformer.pallas.tpu.attention.softmax_attention import run
    return run(_share_key_heads(call))


def decode(op: str, read: CacheRead) -> CacheSums:
    """Reads a cache at a few queries by the kernel of the chip that this trace is for; no derivative.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip.
    """
    if chip() == "gpu":
        from memformer.pallas.gpu.attention.decoding import run
    else:
        from memformer.pallas.tpu.attention.decoding import run
    return run(op, read)


def _share_key_heads(call: AttentionCall) -> AttentionCall:
    """The call with k and v repeated where a mesh has more devices along the heads than there are key heads."""
    repeats = key_head_repeats(call.k.shape[2], call.q.shape[2])
    if repeats == 1:
        return call
    k, v, cache = repeat_heads(call.k, repeats), repeat_heads(call.v, repeats), call.cache
    if cache is not None:
        cache = dataclasses.replace(cache, k=repeat_heads(cache.k, repeats), v=repeat_heads(cache.v, repeats))
    return dataclasses.replace(call, k=k, v=v, cache=cache)


def deltaformer(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer by the kernels of the chip that this trace is for; a TPU's where it is for none.

    Returns:
      The output in float32, or bfloat16 where v is, and the writes u.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip.
    """
    if chip() == "gpu":
        from memformer.pallas.gpu.attention.deltaformer import run
    else:
        from memformer.pallas.tpu.attention.deltaformer import run
    ones = jnp.ones(call.v.shape[:3], accumulation_dtype(call.q, call.k, call.v))
    defaults = {"w": call.k, "alpha": ones, "beta": ones}
    missing = {name: x for name, x in defaults.items() if getattr(call, name) is None}
    return run(dataclasses.replace(call, **missing))
