"""The choice between the implementations of an op.

An implementation that cannot serve a call raises NotImplementedError and says why; a user error is a ValueError.
With `implementation=None` the candidates are tried in order of preference and the first that serves is used; a named
implementation is used, or its reason is raised.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from memformer.core.autodiff import in_forward_mode, reverse_only
from memformer.core.calls import AttentionCall, MatrixCall

__all__ = ["check_implementation", "dispatch"]


# Implementations that jax.jvp differentiates.
FORWARD_MODE = ("recurrent", "chunked")

# Implementations that have every derivative of any call.
COMPLETE = ("recurrent",)


def check_implementation(implementation: str | None, implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Raises ValueError unless `implementation` is None or a key of the op's table."""
    if implementation is not None and implementation not in tuple(implementations):
        known = ", ".join(repr(name) for name in implementations)
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")


def dispatch(
    call: MatrixCall | AttentionCall,
    implementation: str | None,
    implementations: Mapping[str, Callable[[Any], Any]],
    prefer: Sequence[str],
    divide: Callable[[Callable[[Any], Any], Any], Any] | None = None,
    complete: Sequence[str] = COMPLETE,
) -> Any:
    """Runs a call by the named implementation, or by the first of `prefer` that serves it.

    The call is traced in the scope `memformer.<op>.<implementation>`, so that the compiled program and profiles show
    which implementation ran.

    Args:
      call: the checked arguments.
      implementation: None, or a key of `implementations`.
      implementations: name to `run(call)`.
      prefer: keys of `implementations`, best first, tried when `implementation` is None.
      divide: `divide(run, call)` runs an implementation where time may be divided over devices.
      complete: implementations that have every derivative of this call, also where jit hides its tangents.

    Raises:
      ValueError: unknown implementation name.
      NotImplementedError: the named implementation cannot serve; the message says why and what can.
    """
    check_implementation(implementation, implementations)
    reasons = []
    for name in prefer if implementation is None else (implementation,):
        try:
            with jax.named_scope(f"memformer.{call.op}.{name}"):
                run = implementations[name]
                checked = call if name in complete else _check_forward_mode(call, name)
                return run(checked) if divide is None else divide(run, checked)
        except NotImplementedError as error:
            if implementation is not None:
                raise
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"no implementation of {call.op} serves this call: {'; '.join(reasons)}")


def _check_forward_mode(call: Any, name: str) -> Any:
    """The call, unless it has tangents that the implementation cannot take; hidden ones are refused when evaluated."""
    if in_forward_mode(vars(call)):
        if name in FORWARD_MODE:
            return call
        raise NotImplementedError(
            f"the {name} form of {call.op} has no forward mode; implementation='chunked' or 'recurrent' has it"
        )
    message = (
        f"the {name} form of {call.op} has no forward mode inside jit, jax.checkpoint, a scan or jax.linearize;"
        " implementation='recurrent' has it"
    )
    return dataclasses.replace(call, **reverse_only(message, vars(call)))
