"""Runs that start from a pretrained model: its config, then its weights in the place of random ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from memformer.core.checks import check
from memformer.models import LanguageModelConfig
from memformer.pretrained import read_model_config, read_parameters

__all__ = ["apply_pretrained", "start_from"]

# Fields of the model that stay as the run's config has them: how it is computed, not which function it is.
KEPT = ("dtype", "param_dtype", "dropout", "remat", "scan_layers")


def apply_pretrained(config: ml_collections.ConfigDict, folder: str) -> None:
    """Writes the model of a Hugging Face folder into a run's config: section `model`, and vocab_size.

    Other values of these fields are replaced, but for dtypes, dropout and remat.

    Raises:
      ValueError: a folder that cannot be loaded, or a run with another type of model.
    """
    kind = config.model.type
    check(kind == "memory_lm", "model.type", "'memory_lm' where init_from is given", kind)
    check(not config.model.scan_layers, "model.scan_layers", "False where init_from is given", True)
    model, vocab = read_model_config(folder)
    write_model(config, model)
    config.vocab_size = vocab


def write_model(config: ml_collections.ConfigDict, model: LanguageModelConfig) -> None:
    """Writes the fields of a model into section `model` of a run's config, but for those of `KEPT`."""
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name == "memory_options":
            # by name of the memory, as in every run
            value = {name: plain(model.options_of(name)) for name in model.pattern}
        if field.name == "memory":
            value = ",".join(model.pattern)
        if field.name not in KEPT:
            config.model[field.name] = plain(value)


def start_from(folder: str, state: dict[str, Any]) -> dict[str, Any]:
    """The train state at step 0 with the weights of a Hugging Face folder, each placed as the random one was.

    Args:
      folder: "" leaves the state as it is.
      state: from `init_state`.

    Raises:
      ValueError: weights that do not fit the model.
    """
    if not folder:
        return state
    params, rest = dict(state["params"]), dict(state.get("rest", {}))
    for name, array in read_parameters(folder):
        old: Any = params.get(name, rest.get(name))
        shape = None if old is None else old.shape
        check(
            shape == array.shape, f"parameter {name} of {folder}", f"of shape {shape} by the run's config", array.shape
        )
        (rest if name in rest else params)[name] = place(array, old)
    state = {**state, "params": params, **({"rest": rest} if rest else {})}
    if "ema" in state:
        # a copy: the step donates both
        state["ema"] = {name: jnp.array(params[name], jnp.float32, copy=True) for name in state["ema"]}
    return state


def place(array: Any, old: jax.Array) -> jax.Array:
    """The array with the dtype and the sharding of `old`, of which each device reads its own part."""

    def shard(index: Any) -> np.ndarray:
        return np.array(array[index], dtype=old.dtype, order="C")

    return jax.make_array_from_callback(old.shape, old.sharding, shard)


def plain(value: Any) -> Any:
    """Mappings as dicts, at every level."""
    return {key: plain(item) for key, item in value.items()} if hasattr(value, "items") else value
