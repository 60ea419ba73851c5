"""The one chooser between the implementations of an op.

An implementation that cannot serve a call raises NotImplementedError and says why; a caller's
mistake is a ValueError. That difference drives the choice: None tries the candidates in order of
preference and takes the first that serves; a named implementation is used or its reason is raised.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

__all__ = ["IMPLEMENTATIONS", "check_implementation", "dispatch"]

IMPLEMENTATIONS = ("recurrent", "chunked", "pallas")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or a known name."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")


def dispatch(
    op: str,
    implementation: str | None,
    candidates: Mapping[str, Callable[..., Any]],
    prefer: Sequence[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs `op` by the implementation asked for, or by the first of `prefer` that can.

    The call is traced under the scope `memformer.<op>.<implementation>`, so that the compiled
    program (and a profile) says which implementation ran.

    Args:
      op: name of the op.
      implementation: None, or a name in `IMPLEMENTATIONS`.
      candidates: implementation name to function; what is missing is not there for this op.
      prefer: names of candidates, best first, tried when `implementation` is None.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: unknown implementation name.
      NotImplementedError: the named implementation cannot serve; the message says why and what can.
    """
    check_implementation(implementation)
    if implementation is not None:
        if implementation not in candidates:
            there = ", ".join(repr(name) for name in candidates)
            raise NotImplementedError(f"{op} has no {implementation!r} implementation yet; use None or {there}")
        prefer = (implementation,)
    reasons = []
    for name in prefer:
        try:
            with jax.named_scope(f"memformer.{op}.{name}"):
                return candidates[name](*args, **kwargs)
        except NotImplementedError as error:
            if implementation is not None:
                raise
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"no implementation of {op} serves this call: {'; '.join(reasons)}")
