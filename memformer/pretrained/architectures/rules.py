"""Rules that convert tensors of a checkpoint to parameters, and back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from memformer.core.types import Array

__all__ = [
    "Rule",
    "bias_rules",
    "concatenate",
    "convolution",
    "copy",
    "experts",
    "fused",
    "projection",
    "transposed",
]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a checkpoint, the parameters that they become, and the conversion both ways.

    Conversions use methods and slices of arrays, so that they also run on shapes alone (`jax.eval_shape`), and give
    views of memory-mapped tensors where they can.

    Attributes:
      keys: names of the tensors.
      parameters: dotted paths of the parameters.
      load: from the tensors to the parameters, in these orders.
      save: its inverse.
    """

    keys: tuple[str, ...]
    parameters: tuple[str, ...]
    load: Callable[..., Sequence[Any]]
    save: Callable[..., Sequence[Any]]


def concatenate(arrays: Sequence[Any], axis: int) -> Any:
    """Concatenates arrays of NumPy, or tracers."""
    return (np if isinstance(arrays[0], np.ndarray) else jnp).concatenate(arrays, axis=axis)


def copy(key: str, parameter: str) -> Rule:
    """The same array under two names.

    Example:
      >>> copy("model.norm.weight", "norm.scale").keys
      ('model.norm.weight',)
    """
    return Rule((key,), (parameter,), lambda x: (x,), lambda x: (x,))


def transposed(key: str, parameter: str) -> Rule:
    """A linear map: [out, in] in the checkpoint, [in, out] here."""
    return Rule((key,), (parameter,), lambda x: (x.T,), lambda x: (x.T,))


def fused(key: str, parameters: Sequence[str], sizes: Sequence[int], *, transpose: bool = True) -> Rule:
    """One tensor whose first axis (`transpose`) or last axis holds several parameters side by side.

    Args:
      key: of the tensor; [sum(sizes), in], or [..., sum(sizes)] without `transpose`.
      parameters: [in, size] each, or [..., size].
      sizes: of the parts.
      transpose: the tensor is stored as [out, in].

    Example:
      >>> rule = fused("c_attn.weight", ("query.kernel", "key.kernel"), (2, 1), transpose=False)
      >>> [part.shape for part in rule.load(np.zeros((5, 3)))]
      [(5, 2), (5, 1)]
    """
    ends = np.cumsum(sizes).tolist()

    def load(x: Array) -> tuple[Array, ...]:
        x = x.T if transpose else x
        return tuple(x[..., end - size : end] for size, end in zip(sizes, ends, strict=True))

    def save(*parts: Array) -> tuple[Array]:
        x = concatenate(parts, -1)
        return (x.T if transpose else x,)

    return Rule((key,), tuple(parameters), load, save)


def convolution(key: str, parameters: Sequence[str], sizes: Sequence[int] | None = None) -> Rule:
    """A depthwise convolution [channels, 1, W] over one parameter [W, channels], or several of `sizes` side by side.

    Its last weight is that of the current token; here the first one is.

    Example:
      >>> rule = convolution("conv1d.weight", ("query", "key"), (2, 1))
      >>> [part.shape for part in rule.load(np.zeros((3, 1, 4)))]
      [(4, 2), (4, 1)]
    """
    ends = np.cumsum(sizes or ()).tolist()

    def load(x: Array) -> tuple[Array, ...]:
        x = x[:, 0, ::-1].T
        parts = zip(sizes or (), ends, strict=True)
        return (x,) if sizes is None else tuple(x[:, end - size : end] for size, end in parts)

    def save(*parts: Array) -> tuple[Array]:
        return (concatenate(parts, 1).T[:, None, ::-1],)

    return Rule((key,), tuple(parameters), load, save)


def experts(keys: Sequence[str], parameter: str) -> Rule:
    """A linear map per expert, [out, in] each, as one parameter [experts, in, out]."""

    def load(*parts: Array) -> tuple[Array]:
        return (concatenate([part.T[None] for part in parts], 0),)

    def save(x: Array) -> tuple[Array, ...]:
        return tuple(x[i].T for i in range(x.shape[0]))

    return Rule(tuple(keys), (parameter,), load, save)


def projection(key: str, parameter: str, bias: bool = False) -> list[Rule]:
    """The rules of a linear map "key.weight" and, with `bias`, "key.bias"."""
    return [transposed(f"{key}.weight", f"{parameter}.kernel"), *(bias_rules(key, parameter) if bias else [])]


def bias_rules(key: str, parameter: str) -> list[Rule]:
    """The rule of the bias of a linear map."""
    return [copy(f"{key}.bias", f"{parameter}.bias")]
