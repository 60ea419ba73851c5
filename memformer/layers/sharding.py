"""Module calls on Explicit meshes, where shardings are part of the types of arrays."""

import contextlib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memformer.core.sharding import explicit_mesh, set_letter_axes
from memformer.core.types import Array

__all__ = ["RULES", "auto_axes", "on_auto_mesh", "partition_spec", "state_letters"]

F = TypeVar("F", bound=Callable[..., Any])

# Logical axis of a parameter -> the dimensions of results that are sharded like it: channels of projections and
# heads, and logits. Those of experts tell the op where its weights lie.
PARAMETER_LETTERS = {"heads": ("C", "G", "H"), "vocab": ("classes",), "experts": ("experts",), "mlp": ("mlp",)}

UNIONS = (typing.Union, types.UnionType)

# Logical axis -> mesh axes. Parameters are sharded over fsdp and tensor; activations over data and fsdp (batch),
# context (time) and tensor (heads, hidden units, vocabulary; between layers time). The axis of experts divides what is
# no expert as fsdp does.
RULES = (
    ("embed", ("fsdp", "expert")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("layers", None),
    ("activation_batch", ("data", "fsdp", "expert")),
    ("activation_time", "context"),
    ("activation_norm_time", ("context", "tensor")),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)


def auto_axes(method: F) -> F:
    """Lets a method of a module run on Explicit meshes: the method sees Auto axes, its results keep shardings.

    The counterpart of `core.sharding.keep_shardings` for modules. Each dimension of a result is sharded like the
    dimension of the same letter in an argument, and heads and logits like the parameters with the logical axes
    "heads" and "vocab". Letters are those of the annotations. The letters of a state, which has none there, are
    `state_letters(state)`, a method of the module or the function below. Without an Explicit mesh this does nothing.

    Random streams in the module advance as usual.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
        parameter = next((x for _, x in nnx.iter_graph(self) if isinstance(x, nnx.Param)), None)
        arrays = [leaves[i] for i in places] + ([] if parameter is None else [parameter.get_value()])
        mesh = explicit_mesh(arrays)
        if mesh is None:
            return method(self, *args, **kwargs)
        graph, state = nnx.split(self)
        axes = _parameter_axes(state)
        for name, value in list(signature.bind(self, *args, **kwargs).arguments.items())[1:]:
            for letters, x in _annotated(signature.parameters[name].annotation, value, self):
                for letter, part in zip(letters.split(), jax.typeof(x).sharding.spec, strict=False):
                    if part is not None:
                        axes[letter] = part
        if "T" in axes:
            # A new cache has the slots of the call's tokens.
            axes.setdefault("S", axes["T"])
        abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
        auto = abstract.update_axis_types(dict.fromkeys(abstract.explicit_axes, AxisType.Auto))
        enter = functools.partial(_enter, mesh=mesh)
        with jax.sharding.use_abstract_mesh(auto), set_letter_axes(axes):
            for i in places:
                leaves[i] = enter(leaves[i])
            module = nnx.merge(graph, jax.tree.map(enter, state))
            args, kwargs = jax.tree.unflatten(tree, leaves)
            result = method(module, *args, **kwargs)
            streams = nnx.state(module, nnx.RngState)
        found = list(_annotated(signature.return_annotation, result, self))
        outputs, structure = jax.tree.flatten(result)
        specs = {id(x): _spec(letters.split(), x.shape, axes, mesh) for letters, x in found}
        outputs = [_place(x, specs.get(id(x), PartitionSpec()), mesh) for x in outputs]
        if streams:
            nnx.update(self, jax.tree.map(lambda x: _place(x, PartitionSpec(), mesh), streams))
        return jax.tree.unflatten(structure, outputs)

    return wrapper  # type: ignore[return-value]


@contextlib.contextmanager
def on_auto_mesh(tree: Any) -> Iterator[Any]:
    """A scope in which the arrays of `tree` that lie on an Explicit mesh lie on the same mesh with Auto axes.

    For host-level functions that compile their own programs. No data moves.
    """
    meshes = [x.sharding.mesh for x in jax.tree.leaves(tree) if isinstance(getattr(x, "sharding", None), NamedSharding)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        yield tree
        return
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def place(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return jax.device_put(x, NamedSharding(auto, sharding.spec))
        return x

    with jax.set_mesh(auto):
        yield jax.tree.map(place, tree)


def _place(x: Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _enter(x: Any, mesh: Mesh | AbstractMesh) -> Array:
    """x as an array of the Auto mesh of the context: its placement is unchanged, but its type shows no sharding."""
    if isinstance(mesh, Mesh) and not jax.typeof(x).sharding.mesh.explicit_axes:
        # Outside of jit and without a mesh that is set, an array may still be on one device only.
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    return jax.sharding.reshard(x, PartitionSpec())


def _parameter_axes(state: Any) -> dict[str, Any]:
    """Mesh axes of the dimensions in `PARAMETER_LETTERS`, from the first parameter that has them sharded."""
    axes: dict[str, Any] = {}
    for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = variable.get_metadata().get("out_sharding") or ()
        for name, part in zip(names, jax.typeof(variable.get_value()).sharding.spec, strict=False):
            for letter in PARAMETER_LETTERS.get(name, ()) if part is not None else ():
                axes.setdefault(letter, part)
    return axes


def _annotated(annotation: Any, value: Any, module: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of an annotated value, with their letters."""
    if value is None:
        return
    for option in typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,):
        if hasattr(option, "dim_str") and len(option.dim_str.split()) == getattr(value, "ndim", None):
            yield option.dim_str, value
            return
        if typing.get_origin(option) is tuple and type(value) is tuple:
            for part, item in zip(typing.get_args(option), value, strict=False):
                yield from _annotated(part, item, module)
            return
        if typing.get_origin(option) in (dict, Mapping) and typing.get_args(option)[1] is not Any:
            for item in value.values():
                yield from _annotated(typing.get_args(option)[1], item, module)
            return
        if hasattr(option, "_fields") and isinstance(value, option):
            for name, part in option.__annotations__.items():
                yield from _annotated(part, getattr(value, name), module)
            return
    letters = getattr(module, "state_letters", state_letters)(value)
    yield from zip(jax.tree.leaves(letters), jax.tree.leaves(value), strict=True)


def state_letters(state: Any) -> Any:
    """The letters of a state: batch first in every array, and heads third in those of four dimensions.

    Example:
      >>> state_letters({"position": jnp.zeros(2)})
      {'position': 'B'}
    """
    return jax.tree.map(lambda x: {0: "", 4: "B S G K"}.get(np.ndim(x), "B"), state)


def _spec(letters: list[str], shape: tuple[int, ...], axes: dict[str, Any], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec of an array; mesh axes that an earlier dimension has, or that do not divide the size, are left out."""
    used: set[str] = set()
    parts = []
    for letter, size in zip(letters, shape, strict=False):
        part = axes.get(letter)
        names = part if isinstance(part, tuple) else () if part is None else (part,)
        fits = not used & set(names) and size % math.prod(mesh.shape[name] for name in names) == 0
        parts.append(part if fits else None)
        used |= set(names) if fits else set()
    return PartitionSpec(*parts)


def dividing_prefix(rule: str | Sequence[str] | None, size: int, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The first mesh axes of a rule that divide a dimension.

    Args:
      rule: names of mesh axes.
      size: of the dimension.
      axes: sizes of the mesh axes that can be used; others are left out.

    Example:
      >>> dividing_prefix(("fsdp", "expert"), 6, {"fsdp": 2, "expert": 2})
      ('fsdp',)
    """
    names = tuple(name for name in ((rule,) if isinstance(rule, str) else rule or ()) if name in axes)
    while size % math.prod(axes[name] for name in names):
        names = names[:-1]
    return names


def partition_spec(
    names: Sequence[str | None] | None, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Partition spec of an array whose axes have these logical names.

    Rules are those of `RULES`. Of several mesh axes the first ones that divide the array axis are taken, a mesh axis
    shards one array axis only (the first that names it), and axes that the mesh lacks are left out.

    Raises:
      ValueError: a logical name without a rule, or another number of names than axes.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
      >>> tuple(partition_spec(("embed", "mlp"), (8, 16), mesh))
      ('fsdp', 'tensor')
    """
    if names is None:
        return PartitionSpec()
    if len(names) != len(shape):
        raise ValueError(f"logical axis names {tuple(names)} must be as many as the axes of shape {tuple(shape)}")
    rules, entries = dict(RULES), []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule; RULES has {', '.join(rules)}")
        rule = rules.get(name) if name is not None else None
        axes = dividing_prefix(rule, size, {axis: n for axis, n in mesh.shape.items() if axis not in used})
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)
