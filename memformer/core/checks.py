"""Argument checks, shared by the whole library.

Every check raises ValueError naming the argument, what was expected and what was given. Checks of numbers also accept
scalars of NumPy and JAX, and return a Python int or float.
"""

import math
import numbers
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.types import Array, ArrayLike, Dims

__all__ = [
    "check",
    "check_array",
    "check_at_least",
    "check_choice",
    "check_floating",
    "check_groups",
    "check_key",
    "check_multiple",
    "check_number",
    "check_options",
    "check_positive",
    "check_size",
]


def check(holds: bool, name: str, expected: str, given: Any) -> None:
    """Raises ValueError "`name` must be `expected`, got `given`" unless `holds`.

    Example:
      >>> check(False, "rate", "in [0, 1)", 1.5)
      Traceback (most recent call last):
      ...
      ValueError: rate must be in [0, 1), got 1.5
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {given!r}")


def check_array(name: str, x: ArrayLike, letters: str, dims: Dims, *, kind: type = jnp.floating) -> Array:
    """Checks an argument against the shape legend of `core.types` and returns it as a jax array.

    Letters not yet in `dims` are bound to the sizes given, so that the first array checked fixes the sizes of the
    later ones.

    Args:
      name: argument name, for the message.
      x: the argument.
      letters: expected shape, such as "B T H K".
      dims: sizes of the letters seen so far; extended in place.
      kind: abstract dtype that the argument must have (`jnp.floating`, `jnp.integer`).

    Raises:
      ValueError: not an array, wrong shape, an empty dimension, wrong dtype, or NumPy integers of 64 bits that
        jax would wrap to other numbers.

    Example:
      >>> check_array("q", jnp.zeros((2, 8, 4, 16)), "B T H K", dims := {}).shape
      (2, 8, 4, 16)
    """
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array, got {type(x).__name__}")
    given, x = x, jnp.asarray(x)
    names = letters.split()
    shape = "[" + ", ".join(names) + "]"
    known = all(n in dims for n in names)
    sizes = f" = {tuple(dims[n] for n in names)}" if known else ""
    fits = x.ndim == len(names) and all(dims.get(n, s) == s for n, s in zip(names, x.shape, strict=True))
    if not fits:
        partial = "" if known else _known_sizes(names, dims)
        raise ValueError(f"{name} must be {shape}{sizes}{partial}, got {x.shape}")
    if any(s == 0 for s in x.shape):
        raise ValueError(f"{name} must be {shape} with no empty dimension, got {x.shape}")
    if not jnp.issubdtype(x.dtype, kind):
        article = "an" if kind.__name__.startswith("i") else "a"
        raise ValueError(f"{name} must have {article} {kind.__name__} dtype, got {x.dtype}")
    if isinstance(given, np.ndarray) and kind is jnp.integer:
        _check_wrapped(name, given, x.dtype)
    dims.update(zip(names, x.shape, strict=True))
    return x


def _check_wrapped(name: str, given: np.ndarray, dtype: np.dtype) -> None:
    # jnp.asarray wraps silently: 2 ** 32 becomes 0, which is padding where ids of segments are meant.
    if given.dtype.itemsize > dtype.itemsize:
        limits = np.iinfo(dtype)
        low, high = given.min(), given.max()
        if low < limits.min or high > limits.max:
            outside = low if low < limits.min else high
            raise ValueError(f"{name} must have values of {dtype} (jax_enable_x64 is off), got {outside}")


def _known_sizes(names: Sequence[str], dims: Dims) -> str:
    known = [f"{n} = {dims[n]}" for n in names if n in dims]
    return f" with {', '.join(known)}" if known else ""


def check_multiple(many: str, few: str, dims: Dims, expected: str) -> int:
    """Returns dims[many] // dims[few]; the sizes must divide.

    Example:
      >>> check_multiple("H", "G", {"H": 8, "G": 2}, "query heads must be a multiple of key/value heads")
      4
    """
    if dims[many] % dims[few]:
        raise ValueError(f"{expected}: got {many} = {dims[many]}, {few} = {dims[few]}")
    return dims[many] // dims[few]


def check_groups(heads: int, groups: int | None) -> int:
    """Returns the number of key/value heads; None means one per head.

    Example:
      >>> check_groups(8, 2), check_groups(8, None)
      (2, 8)
    """
    heads = check_size("heads", heads)
    groups = heads if groups is None else check_size("groups", groups)
    if heads % groups:
        raise ValueError(f"groups must divide heads, got groups = {groups} and heads = {heads}")
    return groups


def check_size(name: str, value: Any) -> int:
    """Returns `value` as an int; it must be an integer of at least 1."""
    return _check_integer(name, value, 1, "a positive integer")


def check_positive(name: str, value: Any) -> int | None:
    """Returns `value` as an int, or None; it must be an integer of at least 1 or None."""
    return None if value is None else _check_integer(name, value, 1, "a positive integer or None")


def check_at_least(name: str, value: Any, least: int) -> int:
    """Returns `value` as an int; it must be an integer of at least `least`."""
    return _check_integer(name, value, least, f"an integer of at least {least}")


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """Returns `value` as a float; it must be a finite number above, or of at least, a bound.

    Example:
      >>> check_number("rate", 0, above=0)
      Traceback (most recent call last):
      ...
      ValueError: rate must be a finite number above 0, got 0
    """
    known = isinstance(value, np.generic | jax.Array) and not isinstance(value, jax.core.Tracer)
    scalar = value.item() if known and value.ndim == 0 else value
    number = isinstance(scalar, numbers.Real) and not isinstance(scalar, bool) and math.isfinite(scalar)
    bounds = [] if above is None else [f" above {above}"]
    bounds += [] if at_least is None else [f" of at least {at_least}"]
    inside = number and (above is None or scalar > above) and (at_least is None or scalar >= at_least)
    check(inside, name, f"a finite number{' and'.join(bounds)}", value)
    return float(scalar)


def check_key(name: str, key: Any) -> None:
    """Raises ValueError unless `key` is one random key, of `jax.random.key` or `jax.random.PRNGKey`.

    Example:
      >>> check_key("key", 3)
      Traceback (most recent call last):
      ...
      ValueError: key must be one random key, such as jax.random.key(0), got 3
    """
    expected = f"{name} must be one random key, such as jax.random.key(0), got "
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"{expected}{key!r}")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    # raw keys have two or four words
    if not (key.shape == () if typed else key.dtype == np.uint32 and key.shape in ((2,), (4,))):
        raise ValueError(f"{expected}{key.dtype} of shape {key.shape}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`.

    Example:
      >>> check_choice("norm", "batch", ("rms", "layer"))
      Traceback (most recent call last):
      ...
      ValueError: norm must be one of 'rms', 'layer', got 'batch'
    """
    # A list is not hashable, so that a plain `in` on a dict would raise TypeError.
    check(any(value == choice for choice in choices), name, f"one of {', '.join(map(repr, choices))}", value)


def check_floating(name: str, dtype: Any) -> np.dtype:
    """Returns a dtype; it must be a floating one.

    Example:
      >>> check_floating("dtype", "int8")
      Traceback (most recent call last):
      ...
      ValueError: dtype must be a floating dtype such as 'float32', got 'int8'
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    check(found is not None and jnp.issubdtype(found, jnp.floating), name, "a floating dtype such as 'float32'", dtype)
    return found


def check_flags(**flags: Any) -> None:
    """Raises ValueError unless every flag is True or False: the text "no" would count as True.

    Example:
      >>> check_flags(sinks="no")
      Traceback (most recent call last):
      ...
      ValueError: sinks must be True or False, got 'no'
    """
    for name, value in flags.items():
        check(isinstance(value, bool | np.bool_), name, "True or False", value)


def check_options(what: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError naming the first key of `options` that is not among `known`.

    Example:
      >>> check_options("memory_options of 'gla'", {"decy": 1}, ("decay", "heads"))
      Traceback (most recent call last):
      ...
      ValueError: memory_options of 'gla' has no key 'decy'; known keys: decay, heads
    """
    for key in options:
        if key not in known:
            raise ValueError(f"{what} has no key {key!r}; known keys: {', '.join(known) or 'none'}")


def _check_integer(name: str, value: Any, least: int, expected: str) -> int:
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    check(integer is not None and integer >= least, name, expected, value)
    return int(value)
