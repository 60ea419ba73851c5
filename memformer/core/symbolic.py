"""Sizes that are symbols while a program is traced: `jax.export` with symbolic dimensions.

A program with symbolic sizes is traced to run elsewhere, so that it has neither kernels nor callbacks to Python, and
what depends on a size as a number (the length of a chunk) is chosen for a long sequence.
"""

from typing import Any

from jax import export

__all__ = ["at_most", "is_symbolic", "padding_to", "round_up"]


def is_symbolic(*sizes: Any) -> bool:
    """Whether any of the sizes is a symbol.

    Example:
      >>> is_symbolic(3), is_symbolic(3, export.symbolic_shape("b")[0])
      (False, True)
    """
    return any(export.is_symbolic_dim(size) for size in sizes)


def at_most(limit: int, size: int) -> int:
    """The smaller of the two as a number; the limit where the size is a symbol.

    Example:
      >>> at_most(64, 5), at_most(64, export.symbolic_shape("t")[0])
      (5, 64)
    """
    return limit if is_symbolic(size) else min(limit, size)


def padding_to(length: int, multiple: int) -> int:
    """The padding from a length to the next multiple.

    Written so that symbols cancel: the padded length of a symbol t is `multiple` times a floor division.

    Example:
      >>> padding_to(5, 4), padding_to(8, 4), padding_to(t := export.symbolic_shape("t")[0], 4) + t
      (3, 0, 4*floordiv(t + 3, 4))
    """
    return round_up(length, multiple) - length


def round_up(size: int, multiple: int) -> int:
    """The next multiple from a size on.

    Example:
      >>> round_up(5, 4), round_up(8, 4)
      (8, 8)
    """
    return (size + multiple - 1) // multiple * multiple
