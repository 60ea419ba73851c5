"""Train states as flat mappings from path to array, as checkpoints store and compare them."""

from collections.abc import Mapping
from typing import Any

import jax

__all__ = ["abstract", "describe", "difference", "flatten", "nest"]

Path = tuple[str, ...]


def flatten(tree: Any) -> dict[Path, Any]:
    """Leaves by their paths, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested plain dicts, so that files do not depend on the classes of optax or Flax."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return nested


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a leaf; without a sharding, the first device."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def describe(flat: Mapping[Path, Any]) -> dict[str, list]:
    """Path joined by slashes -> [dtype, shape]."""
    return {"/".join(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in flat.items()}


def difference(saved: Mapping[str, list], expected: Mapping[str, list], most: int = 4) -> str:
    """The first few paths at which a checkpoint and a model differ."""
    lines = []
    for name in sorted(saved.keys() | expected.keys()):
        if name not in expected:
            lines.append(f"{name} is only in the checkpoint")
        elif name not in saved:
            lines.append(f"{name} is not in the checkpoint")
        elif saved[name] != expected[name]:
            (dtype, shape), (dtype_here, shape_here) = saved[name], expected[name]
            lines.append(f"{name} is {dtype} {shape} in the checkpoint and {dtype_here} {shape_here} here")
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")
