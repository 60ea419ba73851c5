"""A Hugging Face folder: config.json, and the tensors of one or many safetensors files, memory-mapped."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from memformer.models.bert import read_safetensors

__all__ = ["open_tensors", "read_config", "read_index"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ValueError: a folder without one, or one that is not a JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"folder must contain config.json, as Hugging Face models do; {folder} has none")
    return _read_json(path)


def read_index(folder: str | pathlib.Path) -> dict[str, str] | None:
    """File name of each tensor, from the index of a sharded checkpoint; None where there is no index."""
    path = pathlib.Path(folder) / INDEX
    if not path.is_file():
        return None
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{INDEX} must have a weight_map from tensor to file, got {type(names).__name__}")
    return names


def open_tensors(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a folder by name, memory-mapped: headers are read, and data only where it is used.

    Raises:
      ValueError: no weights, a file that the index names and the folder lacks, or tensors that a file lacks.
    """
    folder, names = pathlib.Path(folder), read_index(folder)
    if names is None:
        if not (folder / SINGLE).is_file():
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".h5"))
            found = f"only {', '.join(others)}, which must be converted to safetensors first" if others else "neither"
            raise ValueError(f"folder must contain {SINGLE} or {INDEX} with its files; {folder} has {found}")
        return read_safetensors(folder / SINGLE)
    files = sorted(set(names.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{INDEX} names files that {folder} lacks: {', '.join(absent)}")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors.update(read_safetensors(folder / file))
    lacking = [f"{name} ({file})" for name, file in names.items() if name not in tensors]
    if lacking:
        raise ValueError(f"{INDEX} names tensors that the files lack: {', '.join(lacking)}")
    return tensors


def write_json(path: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Writes a JSON object, with infinities as transformers writes them."""
    path.write_text(json.dumps(_encode(contents), indent=2) + "\n", encoding="utf-8")


def _encode(value: Any) -> Any:
    """JSON has no infinities: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, list | tuple) else value


def _decode(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), object_hook=_decode)
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(contents).__name__}")
    return dict(contents)
