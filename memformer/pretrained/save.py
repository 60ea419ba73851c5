"""Saves models in the Hugging Face format."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from memformer.core.checks import check_size
from memformer.data.tokenizer import FileTokenizer, Tokenizer, save_tokenizer
from memformer.layers.lora import merge_lora
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import MemoryLM
from memformer.pretrained.architectures.fields import explicit
from memformer.pretrained.architectures.rules import Rule
from memformer.pretrained.folder import INDEX, SINGLE, write_json
from memformer.pretrained.table import ARCHITECTURES

__all__ = ["export_tensors", "match_architecture", "save_pretrained"]


def save_pretrained(
    model: MemoryLM,
    folder: str | pathlib.Path,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors, which `load_pretrained` and transformers read.

    The architecture is the one in `ARCHITECTURES` that describes the model's config exactly, so models trained here can
    be saved too. Tensors keep the dtype of the parameters. At most one file is in memory at a time. Low-rank changes
    (`memformer.layers.add_lora`) are merged into the weights, which takes room for the changed ones once more.

    Args:
      model: with all parameters on this host's devices.
      folder: created where it is missing; files of earlier models of the same names are replaced.
      config: further fields of config.json (ids of special tokens), as `load_pretrained` returned them. Those that the
        model determines are taken from the model.
      tokenizer: saved beside the model, as tokenizer.json.
      shard_bytes: size at which a new file begins.

    Raises:
      ValueError: a model that no architecture describes; the message says by which fields.
      ImportError: safetensors is not installed (the extra `hf`).
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ImportError("save_pretrained needs the package safetensors: pip install 'memformer-jax[hf]'") from None
    check_size("shard_bytes", shard_bytes)
    name, written = match_architecture(model, None if config is None else (config.get("architectures") or [None])[0])
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rules, values = ARCHITECTURES[name].rules(model.config), _values(merge_lora(model))
    files = _split(rules, values, shard_bytes)
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX]:
        old.unlink(missing_ok=True)
    index: dict[str, str] = {}
    for number, group in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = dict(export_tensors(group, values))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    if len(files) > 1:
        size = sum(x.size * x.dtype.itemsize for x in values.values())
        contents = {"metadata": {"total_size": size}, "weight_map": index}
        write_json(folder / INDEX, contents)
    kind = ARCHITECTURES[name].model_type
    dtype = values["embedding.table"].dtype.name
    given = config or {}
    if (given.get("architectures") or [name])[0] != name:
        given = given.get("text_config", {})
    # absent ones would take the defaults of the architecture, which mean other tokens or none
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    whole = {**tokens, **given, **written, "architectures": [name], "model_type": kind, "dtype": dtype}
    # the older name of dtype would contradict it
    whole.pop("torch_dtype", None)
    write_json(folder / "config.json", whole)
    there = isinstance(tokenizer, FileTokenizer) and tokenizer.path.resolve().parent == folder.resolve()
    if tokenizer is not None and not there:
        save_tokenizer(tokenizer, folder)


def match_architecture(model: MemoryLM, preferred: str | None = None) -> tuple[str, dict[str, Any]]:
    """The architecture that describes a model exactly, and its fields of config.json.

    Args:
      model: the model.
      preferred: the architecture that is tried first.

    Raises:
      ValueError: none does; the message names the fields in which each differs.
    """
    config = _with_hidden(model)
    wanted = explicit(config)
    faults = []
    for name in sorted(ARCHITECTURES, key=lambda name: name != preferred):
        row = ARCHITECTURES[name]
        if row.config is None:
            continue
        try:
            written = row.config(config, model.num_classes)
            got = explicit(LanguageModelConfig(**row.fields(written)))
        except (KeyError, ValueError) as error:
            faults.append(f"{name}: {error}")
            continue
        different = [key for key in wanted if got.get(key) != wanted[key]]
        if not different and model.num_classes == model.vocab_size:
            return name, written
        faults.append(f"{name}: {', '.join(different) or 'num_classes'}")
    raise ValueError(f"model must be one that an architecture describes; all differ: {'; '.join(faults)}")


def export_tensors(rules: list[Rule], values: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a checkpoint by name, converted one rule at a time."""
    for rule in rules:
        arrays = rule.save(*(np.asarray(values[name]) for name in rule.parameters))
        for key, array in zip(rule.keys, arrays, strict=True):
            yield key, np.ascontiguousarray(array, dtype=values[rule.parameters[0]].dtype)


def _values(model: MemoryLM) -> dict[str, jax.Array | np.ndarray]:
    """Parameters, and corrections of routers, by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    values = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    # parameters may be NumPy arrays, which have no devices
    away = [name for name, x in values.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if away:
        raise ValueError(f"model must have all its parameters on this host's devices; {away[0]} is on others too")
    return _unstack(values, len(model.config.pattern)) if model.config.scan_layers else values


def _unstack(values: dict[str, jax.Array | np.ndarray], size: int) -> dict[str, jax.Array | np.ndarray]:
    """The parameters of each layer of a scanned model; `size` blocks of which each holds one layer per group."""
    layers = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if first != "blocks":
            layers[name] = value
            continue
        block, _, inner = rest.partition(".")
        layers |= {f"blocks.{group * size + int(block)}.{inner}": x for group, x in enumerate(value)}
    return layers


def _with_hidden(model: MemoryLM) -> LanguageModelConfig:
    """The config with the hidden width of the feedforward layers written out."""
    # the first ones may be dense
    layer = model.blocks[-1].feedforward
    if layer is None:
        return model.config
    up = layer.up if isinstance(layer.up, nnx.Variable) else layer.up.kernel
    options = {**model.config.feedforward_options, "hidden": up.shape[-1]}
    return dataclasses.replace(model.config, feedforward_options=options)


def _split(rules: list[Rule], values: Mapping[str, Any], most: int) -> list[list[Rule]]:
    """Groups of rules, one per file, of at most `most` bytes unless one rule alone has more."""
    files: list[list[Rule]] = [[]]
    size = 0
    for rule in rules:
        bytes_ = sum(math.prod(values[name].shape) * values[name].dtype.itemsize for name in rule.parameters)
        if files[-1] and size + bytes_ > most:
            files.append([])
            size = 0
        files[-1].append(rule)
        size += bytes_
    return files
