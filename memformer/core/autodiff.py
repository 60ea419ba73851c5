"""Derivatives beyond the first in reverse mode: which trace asks for them, and a refusal in words."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from memformer.core.types import Array

__all__ = ["in_forward_mode", "reverse_once", "reverse_only"]


def in_forward_mode(*arrays: Any) -> bool:
    """Whether any array is a tangent-carrying tracer of jax.jvp, jax.jacfwd or another forward-mode transformation.

    A custom_vjp has no forward mode, so that a function which has one calls its plain form instead. jax.hessian is
    forward mode over reverse mode: the reverse pass is resolved first, and this is False. It is also False where jit,
    jax.checkpoint, a scan or jax.linearize hides the tangents; `reverse_only` refuses those.

    Example:
      >>> jax.jvp(lambda x: x if in_forward_mode(x) else 0.0, (3.0,), (1.0,))[0]
      3.0
    """

    def forward(x):
        # Under vmap.
        while isinstance(x, jax.core.Tracer) and hasattr(x, "val"):
            x = x.val
        return isinstance(x, ad.JVPTracer)

    return any(forward(x) for x in jax.tree.leaves(arrays))


_reverse_once = Primitive("memformer_reverse_once")


def reverse_once(message: str, *arrays: Array | None) -> tuple[Array | None, ...]:
    """Arrays unchanged; differentiating them in reverse mode raises NotImplementedError(message).

    For the rules of a custom_vjp that hold loops of unknown length, of which JAX has no reverse mode.
    """
    return tuple(None if x is None else _reverse_once.bind(x, message=message) for x in arrays)


def _raise(cotangent, x, *, message):
    raise NotImplementedError(message)


def _jvp(primals, tangents, *, message):
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _reverse_once.bind(tangent, message=message)
    return _reverse_once.bind(x, message=message), tangent


_reverse_once.def_impl(lambda x, *, message: x)
_reverse_once.def_abstract_eval(lambda x, *, message: x)
ad.primitive_jvps[_reverse_once] = _jvp
ad.primitive_transposes[_reverse_once] = _raise
batching.defvectorized(_reverse_once)
mlir.register_lowering(_reverse_once, lambda context, x, *, message: [x])


_reverse_only = Primitive("reverse_only")
_tangent = Primitive("reverse_only_tangent")


def reverse_only(message: str, arrays: Any) -> Any:
    """A tree of arrays unchanged; evaluating tangents of them raises NotImplementedError(message).

    Reverse mode transposes tangents and never evaluates them. Forward mode does, also where it is hidden from a
    custom_vjp (jit, jax.checkpoint, scans, jax.linearize), which would then fail in JAX's words.
    """

    def mark(x):
        marked = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        return _reverse_only.bind(x, message=message) if marked else x

    return jax.tree.map(mark, arrays)


def _refuse(*_, message):
    raise NotImplementedError(message)


def _mark_tangent(primals, tangents, *, message):
    (x,), (tangent,) = primals, tangents
    # The primal is not marked again: jax.hessian takes tangents of the reverse pass.
    return x, tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent, message=message)


_reverse_only.def_impl(lambda x, *, message: x)
_reverse_only.def_abstract_eval(lambda x, *, message: x)
ad.primitive_jvps[_reverse_only] = _mark_tangent
batching.defvectorized(_reverse_only)
mlir.register_lowering(_reverse_only, lambda context, x, *, message: [x])

_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x, *, message: x)
ad.deflinear2(_tangent, lambda cotangent, x, *, message: [cotangent])
batching.defvectorized(_tangent)
mlir.register_lowering(_tangent, lambda context, x, *, message: _refuse(message=message))
