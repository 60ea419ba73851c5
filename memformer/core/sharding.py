"""Ops on sharded arrays: Explicit meshes, and shard_map."""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memformer.core.types import Array

__all__ = ["explicit_mesh", "keep_shardings", "letter_axes", "mesh_axes", "set_letter_axes", "vary_like"]

F = TypeVar("F", bound=Callable[..., Any])

_axes: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("axes", default=None)


def vary_like(x: Array, *others: Array | None) -> Array:
    """Marks `x` as varying over the mesh axes that any of `others` varies over.

    Inside shard_map the first carry of a scan must vary over the same axes as the later ones; elsewhere this does
    nothing.
    """
    axes = frozenset().union(*(_varying(o) for o in others if o is not None))
    missing = tuple(sorted(axes - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Array) -> frozenset:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def keep_shardings(function: F) -> F:
    """Lets an op run on Explicit meshes: the op sees Auto axes, its results have the shardings of its arguments.

    A mesh from `jax.make_mesh` has Explicit axes by default: shardings are part of the types of arrays, and zeros,
    masks and reshapes inside an op would each have to be typed. Inside `function` all axes are Auto instead, and the
    compiler propagates shardings. Dimensions of one letter in the annotations are sharded alike: a result takes, for
    each of its letters, the mesh axes of the first argument that is sharded there. Elsewhere this does nothing.

    Args:
      function: a function whose arrays, cache and state types are annotated with letters, results included.

    Example:
      >>> from memformer.core.types import Float
      >>> @keep_shardings
      ... def double(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
      ...     return x + x
      >>> double(jnp.ones((1, 2)))
      Array([[2., 2.]], dtype=float32)
    """
    signature = inspect.signature(function)
    returned = signature.return_annotation

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
        mesh = explicit_mesh([leaves[i] for i in places])
        if mesh is None:
            return function(*args, **kwargs)
        axes: dict[str, Any] = {}
        seen: set[str] = set()
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            for letters, x in _letters(signature.parameters[name].annotation, value):
                seen.update(letters)
                if len(letters) == getattr(x, "ndim", None):
                    for letter, part in zip(letters, jax.typeof(x).sharding.spec, strict=False):
                        if part is not None:
                            axes.setdefault(letter, part)
        if "T" in axes and "S" not in seen:
            # A new cache has the slots of the call's tokens.
            axes["S"] = axes["T"]
        abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
        auto = abstract.update_axis_types(dict.fromkeys(abstract.explicit_axes, AxisType.Auto))
        for place in places:
            x = jax.numpy.asarray(leaves[place])
            if isinstance(mesh, Mesh) and not jax.typeof(x).sharding.mesh.explicit_axes:
                # Arrays on one device, such as the length of a new cache, go to all devices of the mesh.
                x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
            leaves[place] = x
        with jax.sharding.use_abstract_mesh(auto), set_letter_axes(axes):
            for place in places:
                leaves[place] = jax.sharding.reshard(leaves[place], PartitionSpec())
            args, kwargs = jax.tree.unflatten(tree, leaves)
            result = function(*args, **kwargs)
        specs = {id(x): _spec(letters, axes) for letters, x in _letters(returned, result) if len(letters) == x.ndim}
        out, structure = jax.tree.flatten(result)
        out = [jax.sharding.reshard(x, NamedSharding(mesh, specs[id(x)])) for x in out]
        return jax.tree.unflatten(structure, out)

    return wrapper  # type: ignore[return-value]


def mesh_axes(letter: str) -> Any:
    """The Explicit mesh axes on which a letter's dimension lies, while an op runs; None where it is not sharded.

    Inside an op these axes are Auto, so that types no longer show them. Kernels need them to run per device.
    """
    return (_axes.get() or {}).get(letter)


def letter_axes() -> dict[str, Any] | None:
    """The Explicit mesh axes of each letter of the op or module that is traced; None on meshes with Auto axes alone."""
    return _axes.get()


@contextlib.contextmanager
def set_letter_axes(axes: dict[str, Any]) -> Iterator[None]:
    """Scope in which the letters' dimensions lie on these Explicit mesh axes."""
    token = _axes.set(axes)
    try:
        yield
    finally:
        _axes.reset(token)


def explicit_mesh(arrays: list[Any]) -> Mesh | AbstractMesh | None:
    """The mesh with Explicit axes that is set, or else that the arrays lie on."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        return mesh
    found = [x for x in arrays if isinstance(x, jax.Array) and jax.typeof(x).sharding.mesh.explicit_axes]
    # Outside of jit and without a mesh that is set, only an array itself knows the devices.
    devices = (typing.cast(NamedSharding, x.sharding).mesh for x in found if not isinstance(x, jax.core.Tracer))
    return next(devices, jax.typeof(found[0]).sharding.mesh if found else None)


def _spec(letters: tuple[str, ...], axes: dict[str, Any]) -> PartitionSpec:
    """The spec of an array of these letters; an axis that an earlier dimension has is left out."""
    used: set[str] = set()
    parts = []
    for letter in letters:
        part = axes.get(letter)
        names = set(part if isinstance(part, tuple) else () if part is None else (part,))
        parts.append(None if names & used else part)
        used |= names
    return PartitionSpec(*parts)


def _letters(annotation: Any, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Letters of each array in an annotated value, with that array; each option of a union is tried."""
    if value is None:
        return
    if hasattr(annotation, "dim_str"):
        yield tuple(annotation.dim_str.split()), value
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _letters(option, value)
    elif typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        if isinstance(value, tuple) and len(value) == len(parts):
            for part, item in zip(parts, value, strict=True):
                yield from _letters(part, item)
    elif dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
        for name, part in annotation.__annotations__.items():
            yield from _letters(part, getattr(value, name, None))
