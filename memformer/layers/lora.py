"""Low-rank changes of the linear maps of a model, trained in place of the maps themselves (LoRA)."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_number, check_size
from memformer.core.patterns import match_names
from memformer.layers.basic import Linear, named

__all__ = ["add_lora", "is_lora", "merge_lora"]

M = TypeVar("M", bound=nnx.Module)

# The last words of the paths of the added parameters.
PARAMETERS = ("lora_a", "lora_b")


def add_lora(model: nnx.Module, *, rank: int, alpha: float, targets: str, rngs: nnx.Rngs) -> tuple[str, ...]:
    """Adds low-rank changes to the linear maps of a model, in place.

        y = x (W + (alpha / rank) A B) + b,    A [in, rank],    B [rank, out]

    A is random with standard deviation in^-0.5 and B is zero, so that the model computes the same function at first.
    Both are float32 whatever the dtype of W, since they are what is trained. They are sharded as the axes of W are.

    Args:
      model: its linear maps are those of `memformer.layers.linear`; maps of scanned layers are changed per layer.
      rank: of A B.
      alpha: scale of the change.
      targets: regular expressions separated by commas, each found in the path of at least one linear map, such as
        "query, value" or "memory, feedforward".
      rngs: random streams.

    Returns:
      The paths of the changed maps.

    Raises:
      ValueError: a pattern that is found in no path; the message lists near ones.

    Source: arXiv 2106.09685.

    Example:
      >>> from memformer.layers import build_memory
      >>> layer = build_memory("softmax_attention", 16, heads=2, rngs=nnx.Rngs(0))
      >>> add_lora(layer, rank=4, alpha=8.0, targets="query, value", rngs=nnx.Rngs(1))
      ('projections.query', 'projections.value')
      >>> layer.projections.query.lora_a.shape, layer.projections.query.lora_b.shape
      ((16, 4), (4, 16))
    """
    rank, alpha = check_size("rank", rank), check_number("alpha", alpha, above=0)
    maps = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    chosen = match_names("targets", targets, sorted(maps))
    for name in chosen:
        layer = maps[name]
        kernel: Any = layer.kernel
        *outer, size_in, size_out = kernel.shape
        names = tuple(kernel.get_metadata().get("out_sharding") or (None,) * len(kernel.shape))
        normal = named(nnx.initializers.normal(size_in**-0.5), *names[:-1], None)
        layer.lora_a = nnx.Param(normal(rngs.params(), (*outer, size_in, rank), jnp.float32))
        zeros = named(nnx.initializers.zeros, *names[:-2], None, names[-1])
        layer.lora_b = nnx.Param(zeros(rngs.params(), (*outer, rank, size_out), jnp.float32))
        layer.lora_scale = alpha / rank
    return chosen


def is_lora(name: str) -> bool:
    """Whether a dotted path is that of a parameter of `add_lora`.

    Example:
      >>> is_lora("projections.query.lora_a"), is_lora("projections.query.kernel")
      (True, False)
    """
    return name.rpartition(".")[2] in PARAMETERS


def merge_lora(model: M) -> M:
    """A copy of a model in which low-rank changes are part of the weights: W + (alpha / rank) A B.

    It computes the same function with fewer products. All other arrays are shared with the model.

    Example:
      >>> from memformer.layers import build_memory
      >>> layer = build_memory("softmax_attention", 16, heads=2, rngs=nnx.Rngs(0))
      >>> changed = add_lora(layer, rank=4, alpha=8.0, targets="query", rngs=nnx.Rngs(1))
      >>> merge_lora(layer).projections.query.lora_a is None
      True
    """
    merged = nnx.clone(model)
    for _, layer in nnx.iter_modules(merged):
        if isinstance(layer, Linear) and layer.lora_a is not None:
            kernel: Any = layer.kernel
            kernel.set_value(_merged(kernel.get_value(), layer))
            layer.lora_a = layer.lora_b = nnx.data(None)
    return merged


def _merged(kernel: jax.Array, layer: Linear) -> jax.Array:
    wide = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32
    a, b = (x[...].astype(wide) for x in (layer.lora_a, layer.lora_b))
    change = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (kernel.astype(wide) + layer.lora_scale * change).astype(kernel.dtype)
