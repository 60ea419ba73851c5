"""The JAX programs that benchmarks.gpu verifies and times: this library's implementations, and cuDNN."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.gpu.cases import CUDNN

__all__ = ["compile_call", "function", "round_inputs"]


def round_inputs(arrays: Mapping[str, np.ndarray], dtype: str = "bfloat16") -> dict[str, jax.Array]:
    """Casts q, k, v and w to `dtype` and the rest to float32, the dtypes of the kernels."""
    return {name: jnp.asarray(x).astype(dtype if name in "qkvw" else "float32") for name, x in arrays.items()}


def function(case: Case, name: str) -> Callable[..., jax.Array]:
    """The function of a contestant: from the arrays of `cases.inputs` to the output, or to u."""
    ids = cases.segment_ids(case)
    if name == CUDNN:
        return functools.partial(_cudnn, ids)
    options: dict[str, Any] = case.options | {"implementation": name}

    def run(arrays):
        given = dict(arrays)
        if case.op == "deltaformer" and case.heads == case.groups:
            # FLA writes with the read queries.
            given["w"] = given["q"]
        given["segment_ids"] = _segment_ids(ids)
        if case.slots:
            given["initial_state"] = _full_cache(case, arrays)
        output, state = getattr(mf, case.op)(**given, **options)
        return state.u if case.only_u else output

    return run


def _full_cache(case: Case, arrays: Mapping[str, jax.Array]) -> Any:
    """A cache with room for the tokens of the case alone."""
    decays = {"decay_heads": arrays["decay"].shape[2]} if case.decay else {}
    sizes = {"batch": case.batch, "capacity": case.slots, "groups": case.groups}
    widths = {"key_width": case.key, "value_width": case.value}
    cache = mf.init_cache(case.op, **sizes, **widths, **decays, dtype=arrays["k"].dtype)
    used = case.slots - case.length
    valid = jnp.broadcast_to(jnp.arange(case.slots)[None] < used, (case.batch, case.slots))
    # Known while tracing, so that the program needs no callback that reports an overflow.
    length: Any = np.int32(used)
    return dataclasses.replace(cache, valid=valid, length=length)


def _segment_ids(ids: np.ndarray | None) -> jax.Array | None:
    # Without the barrier the compiler would evaluate the mask at compile time.
    return None if ids is None else jax.lax.optimization_barrier(jnp.asarray(ids))


def _cudnn(ids: np.ndarray | None, arrays: Mapping[str, jax.Array]) -> jax.Array:
    # Its public form has no segment ids: packed sequences need a T x T mask.
    segments = _segment_ids(ids)
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    q, k, v = (arrays[name] for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def compile_call(case: Case, name: str, gradient: bool, arrays: Mapping[str, jax.Array], cotangent: jax.Array):
    """Compiles one contestant to `(arrays, cotangent) -> {name: array}`, the output or the gradients."""
    run = function(case, name)

    def forward(arrays, cotangent):
        return {"output": run(arrays)}

    def both(arrays, cotangent):
        output, pull = jax.vjp(run, arrays)
        return pull(cotangent.astype(output.dtype))[0]

    return jax.jit(both if gradient else forward).lower(arrays, cotangent).compile()
