"""Softmax attention by cuDNN, through jax.nn, where that can serve it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float
from memformer.ops.attention.cache import Cache, Timeline
from memformer.ops.attention.recurrent import Reading

__all__ = ["cudnn_attention"]


def cudnn_attention(
    reading: Reading, timeline: Timeline, cache: Cache | None, q: Array, k: Array, v: Array
) -> Float[Array, "B T H V"]:
    """Runs softmax attention by jax.nn.dot_product_attention(implementation="cudnn").

    Raises:
      NotImplementedError: segments; a state; a window of an encoder; a chunk size; a precision; inputs that are not
        all float16 or all bfloat16; keys and values of different widths; or what jax.nn refuses (no cuDNN here, a
        width that it does not take).
    """
    needs = {
        "no segment_ids": timeline.key_segment is None,
        "no initial_state": cache is None,
        "no window of an encoder": reading.window is None or reading.causal,
        "no chunk_size": reading.chunk_size is None,
        "default precision": reading.precision == lax.Precision.DEFAULT,
        "float16 or bfloat16": q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float16, jnp.bfloat16),
        "values as wide as keys": k.shape[-1] == v.shape[-1],
    }
    missing = [what for what, there in needs.items() if not there]
    if missing:
        raise NotImplementedError(f"softmax_attention by cuDNN needs {', '.join(missing)}")
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=reading.scale,
        is_causal=reading.causal,
        # Tokens before and after the query's own.
        local_window_size=None if reading.window is None else (reading.window - 1, 0),
        implementation="cudnn",
    )
    try:
        # Whether it can is known before any of it is in the program.
        jax.eval_shape(attend, q, k, v)
    except RuntimeError as error:
        raise NotImplementedError(f"softmax_attention by cuDNN: {error}") from error
    return attend(q, k, v)
