"""The shape legend of the library, its array aliases, and the checks that speak it.

Every array is named by letters, in code, documentation and tests:

    B  batch                 K  key width
    T  time (queries)        V  value width
    S  source time (cache)   D  model width
    H  heads (of queries)    N  chunks, or delta steps a token
    G  key/value heads       C  chunk length
       where fewer (H % G == 0)

Arrays are [B, T, H, K]; a matrix state is [B, H, K, V] in float32 (float64 under x64).
Nothing else in the library defines letters.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "ArrayLike", "Bool", "Dims", "Float", "Int", "check_array", "check_groups", "check_positive"]

ArrayLike: TypeAlias = jax.typing.ArrayLike
Dims: TypeAlias = dict[str, int]


def check_array(name: str, x: ArrayLike, letters: str, dims: Dims, *, kind: type = jnp.floating) -> Array:
    """Checks one argument against the legend and returns it as a jax array.

    Letters not yet in `dims` are bound to the sizes that came, so that the first argument
    checked sets what the later ones are held against.

    Args:
      name: argument name, for the message.
      x: the argument.
      letters: expected shape, such as "B T H K".
      dims: sizes of the letters seen so far; extended in place.
      kind: the abstract dtype the argument must have (`jnp.floating`, `jnp.integer`).

    Raises:
      ValueError: names the argument, what was expected and what came.

    Example:
      >>> check_array("q", jnp.zeros((2, 8, 4, 16)), "B T H K", dims := {}).shape
      (2, 8, 4, 16)
    """
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array, got {type(x).__name__}")
    x = jnp.asarray(x)
    names = letters.split()
    shape = "[" + ", ".join(names) + "]"
    known = all(n in dims for n in names)
    sizes = f" = {tuple(dims[n] for n in names)}" if known else ""
    fits = x.ndim == len(names) and all(dims.get(n, s) == s for n, s in zip(names, x.shape, strict=True))
    if not fits:
        partial = "" if known else _partial(names, dims)
        raise ValueError(f"{name} must be {shape}{sizes}{partial}, got {x.shape}")
    if any(s == 0 for s in x.shape):
        raise ValueError(f"{name} must be {shape} with no empty dimension, got {x.shape}")
    if not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{name} must have a {kind.__name__} dtype, got {x.dtype}")
    dims.update(zip(names, x.shape, strict=True))
    return x


def _partial(names: Sequence[str], dims: Dims) -> str:
    known = [f"{n} = {dims[n]}" for n in names if n in dims]
    return f" with {', '.join(known)}" if known else ""


def check_groups(many: str, few: str, dims: Dims, what: str) -> int:
    """Returns dims[many] // dims[few], or says that heads cannot be shared that way.

    Example:
      >>> check_groups("H", "G", {"H": 8, "G": 2}, "query heads must be a multiple of key/value heads")
      4
    """
    if dims[many] % dims[few]:
        raise ValueError(f"{what}: got {many} = {dims[many]}, {few} = {dims[few]}")
    return dims[many] // dims[few]


def check_positive(name: str, value: int | None) -> None:
    """Raises ValueError unless `value` is None or an integer of at least 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
