"""Softmax attention on Hopper: layout of a call, and the rule of differentiation of a read.

Source: arXiv 2205.14135 (tiles with a running maximum), 2407.08608 (warpgroups that compute and one that copies).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, join_cache
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.gpu.attention.backward import key_gradients, query_gradients
from memformer.pallas.gpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.gpu.attention.forward import read
from memformer.pallas.gpu.attention.tiles import split_values
from memformer.pallas.layout import heads_first, join_slots

__all__ = ["attend", "run"]


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention, causal and without a window.

    Returns:
      The output in bfloat16.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    config = plan_call(call, call.read_kernel, {"q": call.q, "k": call.k, "v": call.v})
    length, width = call.v.shape[1], call.v.shape[3]
    mask = join_cache(call.mask, config.rows)
    cache_k, cache_v = (None, None) if call.cache is None else (call.cache.k, call.cache.values)
    arrays = (
        join_slots(_pad(cache_k, config.key), _pad(call.k, config.key), config.rows),
        heads_first(_pad(call.q, config.key), config.rows),
        join_slots(_pad(cache_v, config.value), _pad(call.v, config.value), config.rows),
    )
    k, q, v = (vary_like(x, *arrays, *jax.tree.leaves(mask)) for x in arrays)
    o = attend(config, jnp.bfloat16, k, q, v, mask)
    return jnp.swapaxes(o, 1, 2)[:, :length, :, :width]


def _pad(x: Array | None, width: int) -> Array | None:
    return None if x is None else pad_time(x, width, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask) -> Array:
    """`read`, differentiable in k, q and x; memory is linear in time, backward too.

    Saved: the inputs, the output and the log-sum-exp.
    """
    return read(config, dtype, k, q, split_values(config, x), mask)[0]


def _attend_forward(config, dtype, k, q, x, mask):
    o, lse = read(config, dtype, k, q, split_values(config, x), mask)
    return o, (k, q, x, mask, o if config.similarity.normalized else None, lse)


def _attend_backward(config, dtype, saved, do):
    k, q, x, mask, o, lse = saved
    delta = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    scalars = {"lse": lse, "delta": delta}
    operands = (k, q, split_values(config, x), split_values(config, do), mask, scalars)
    (dq,) = query_gradients(config, *operands)
    dk, dx = key_gradients(config, *operands, ("dk", "dx"))
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None


attend.defvjp(_attend_forward, _attend_backward)
