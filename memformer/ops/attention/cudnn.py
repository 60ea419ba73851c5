"""Softmax attention by cuDNN, through jax.nn, where that can serve it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.types import Array, Float

__all__ = ["softmax_attention"]


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention by jax.nn.dot_product_attention(implementation="cudnn").

    Raises:
      NotImplementedError: segments; a state; decay or sinks; a window without causality; a chunk size; a precision;
        inputs that are not all float16 or all bfloat16; keys and values of different widths; or what jax.nn refuses
        (no cuDNN here, an unsupported width).
    """
    q, k, v = call.q, call.k, call.v
    needs = {
        "no segment_ids": call.mask.key_segment is None,
        "no initial_state": call.cache is None,
        "no decay and no sinks": call.decay is None and call.sinks is None,
        "no window without causality": call.window is None or call.causal,
        "no chunk_size": call.chunk_size is None,
        "default precision": call.precision == lax.Precision.DEFAULT,
        "float16 or bfloat16": q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float16, jnp.bfloat16),
        "values as wide as keys": k.shape[-1] == v.shape[-1],
    }
    missing = [what for what, given in needs.items() if not given]
    if missing:
        raise NotImplementedError(
            f"softmax_attention by cuDNN needs {', '.join(missing)}; implementation='chunked' serves this call"
        )
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=call.read_kernel.scale,
        is_causal=call.causal,
        # Tokens before and after the query's own.
        local_window_size=None if call.window is None else (call.window - 1, 0),
        implementation="cudnn",
    )
    try:
        # Find out whether cuDNN can serve before any of it is part of the program.
        jax.eval_shape(attend, q, k, v)
    except RuntimeError as error:
        raise NotImplementedError(
            f"softmax_attention by cuDNN: {error}; implementation='chunked' serves this call"
        ) from error
    return attend(q, k, v)
