"""The base of all model configs."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from memformer.core.checks import check, check_flags, check_size
from memformer.layers.basic import Dtypes, check_rate

__all__ = ["BaseConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Base of the frozen dataclasses that describe the shape of a model.

    A subclass declares its fields and checks them in its own `__post_init__`, which calls this one first. Values are
    normalised here: "none" becomes None where the field allows None (a command line cannot express None otherwise),
    scalars of NumPy and JAX become Python numbers, and mappings and lists become hashable, because a config is part of
    the structure of a model, which keys the compilation cache.

    Attributes:
      dtype: of activations.
      param_dtype: of parameters.

    Raises:
      ValueError: a dtype that is not floating, an option section that is not a mapping, or dropout outside [0, 1).
    """

    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _normalize(field, getattr(self, field.name)))
        object.__setattr__(self, "dtype", self.dtypes.compute.name)
        object.__setattr__(self, "param_dtype", self.dtypes.param.name)
        check_rate("dropout", getattr(self, "dropout", 0.0))

    @property
    def dtypes(self) -> Dtypes:
        """The dtype policy."""
        return Dtypes(self.dtype, self.param_dtype)

    def check_sizes(self, *names: str) -> None:
        """Raises ValueError unless each of these fields is an integer of at least 1."""
        for name in names:
            check_size(name, getattr(self, name))


def _normalize(field: dataclasses.Field, value: Any) -> Any:
    if typing.get_origin(field.type) is Mapping:
        value = value or {}
        check(isinstance(value, Mapping), field.name, "a mapping", value)
    choices = typing.get_args(field.type) or (field.type,)
    if type(None) in choices and isinstance(value, str) and value == "none":
        return None
    value = _freeze(value)
    if field.type is bool:
        check_flags(**{field.name: value})
    return value


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value
