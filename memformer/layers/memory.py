"""Builds memory layers by the names of the table."""

import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from memformer.core.checks import check_choice, check_options
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import Dtypes
from memformer.layers.recurrent import RecurrentMemory
from memformer.layers.table import MEMORIES

__all__ = ["build_memory", "check_memory", "known_options"]

_FIXED = ("self", "width", "dtypes", "rngs", "head_counts", "writes", "options")


def known_options(name: str) -> tuple[str, ...]:
    """The options of a memory, by name of the memory.

    Raises:
      ValueError: an unknown memory.

    Example:
      >>> "window" in known_options("softmax_attention")
      True
    """
    check_memory(name)
    layer = MEMORIES[name].layer
    # A layer takes the options of the layers that it derives from.
    classes: list[Any] = [base for base in layer.__mro__ if issubclass(base, MemoryLayer)] or [layer]
    names = [name for base in classes for name in inspect.signature(base.__init__).parameters]
    return tuple(dict.fromkeys(n for n in names if n not in _FIXED))


def check_memory(name: str) -> None:
    """Raises ValueError unless `name` is a key of `MEMORIES`."""
    check_choice("memory", name, tuple(MEMORIES))


def build_memory(
    name: str,
    width: int,
    *,
    heads: int,
    key_width: int | None = None,
    value_width: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtypes: Dtypes | None = None,
    rngs: nnx.Rngs,
) -> MemoryLayer | RecurrentMemory:
    """Builds the layer of a memory.

    Args:
      name: a key of `MEMORIES`.
      width: D.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      options: override those of the table, and heads, key_width and value_width (so that the memories of a pattern may
        have sizes of their own); `known_options(name)` lists them.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: an unknown memory or option, or a size that does not fit.

    Example:
      >>> layer = build_memory("delta_rule", 16, heads=2, rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((1, 5, 16)))
      >>> y.shape, state["memory"].shape
      ((1, 5, 16), (1, 2, 8, 8))
    """
    options = {} if options is None else options
    check_options(f"memory_options of {name!r}", options, known_options(name))
    row = MEMORIES[name]
    sizes: dict[str, Any] = {"heads": heads, "key_width": key_width, "value_width": value_width}
    return row.layer(width, dtypes=dtypes, rngs=rngs, **{**sizes, **row.options, **options})
