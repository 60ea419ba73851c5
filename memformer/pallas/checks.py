"""Reasons why a kernel cannot serve a call, in one wording for every chip.

Each is a NotImplementedError, so that `implementation=None` tries the next implementation.
"""

import jax
import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.types import Array

__all__ = ["check_chip", "check_chunk_size", "check_dtypes", "check_matrix_call", "unsupported"]

SERVED = "implementation='chunked' serves it"


def unsupported(op: str, reason: str, served: str = SERVED) -> NotImplementedError:
    """The error of a kernel that cannot serve a call.

    Args:
      op: name of the public function.
      reason: what the kernel lacks, as the predicate of a sentence.
      served: which implementation serves the call.

    Example:
      >>> str(unsupported("delta_rule", "has no float64"))
      "the delta_rule kernel has no float64; implementation='chunked' serves it"
    """
    return NotImplementedError(f"the {op} kernel {reason}; {served}")


def check_chip(op: str, there: bool, needed: str) -> None:
    """Raises unless this trace is for the chip that the kernel needs."""
    if not there:
        raise unsupported(
            op,
            f"needs {needed} (or a trace for one under jax.sharding.use_abstract_mesh), and this is"
            f" {jax.default_backend()!r}",
            "implementation='chunked' serves here",
        )


def check_dtypes(op: str, arrays: tuple[Array, ...], allowed: tuple[str, ...], reason: str) -> None:
    """Raises unless every array has one of the allowed dtypes; `reason` is the predicate of the message."""
    if any(x.dtype not in map(jnp.dtype, allowed) for x in arrays):
        raise unsupported(op, f"{reason}, got {', '.join(str(x.dtype) for x in arrays)}")


def check_chunk_size(op: str, chunk_size: int | None, allowed: tuple[int, ...]) -> None:
    """Raises unless the caller left the chunk to the kernel, or named one that it has."""
    if chunk_size is not None and chunk_size not in allowed:
        sizes = str(allowed[0]) if len(allowed) == 1 else f"among {allowed}"
        raise unsupported(op, f"takes chunk_size {sizes}, got {chunk_size}")


def check_matrix_call(call: MatrixCall) -> None:
    """Raises where a call of a matrix memory asks for what the kernels lack that decode."""
    if call.document_states:
        raise unsupported(call.op, "takes one initial_state per row, not one per document")
