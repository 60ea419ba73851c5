"""Export of a language model for serving: prefill and step as programs that run without memformer."""

import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from memformer.core.checks import check, check_choice
from memformer.core.types import Array
from memformer.models import serve
from memformer.models.generate import check_model, read_prompts
from memformer.models.language_model import MemoryLM

__all__ = ["PLATFORMS", "export_model"]

# Platforms that a program may be exported for, by jax's names.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

Arrays = dict[str, Array]


def export_model(
    model: MemoryLM, folder: str | pathlib.Path, *, platforms: Sequence[str] = ("cpu", "cuda", "tpu")
) -> None:
    """Writes a model as two programs in StableHLO, prefill and step, with its weights beside them.

    Batch size, prompt length and capacity of caches are symbols: one export serves all of them, and each new
    combination is compiled where it runs. The programs hold the XLA implementations, without Pallas kernels, for one
    device. The folder gets:

        prefill.bin, step.bin   programs, serialized by `jax.export`
        weights.npz             parameters by dotted path
        manifest.json           shapes and dtypes of weights and state, number of ids, platforms, versions
        serve.py                `ServedModel`, which runs them; needs jax, numpy and flatbuffers

    Args:
      model: a language model that takes ids, in evaluation mode, with all parameters on this host's devices.
      folder: created where it is missing; files of the same names are replaced.
      platforms: on which the programs can run, of `PLATFORMS`.

    Raises:
      ValueError: another kind of model, one in training mode, or an unknown platform.
      ImportError: flatbuffers is not installed (the extra `export`).

    Source: docs.jax.dev/en/latest/export (also on how long a program can be read by later versions of jax).

    Example:
      >>> from memformer.models import LanguageModelConfig
      >>> model = MemoryLM(LanguageModelConfig(memory="retnet", width=8, heads=2), vocab_size=7, rngs=nnx.Rngs(0))
      >>> export_model(model, "folder", platforms=("gpu",))
      Traceback (most recent call last):
      ...
      ValueError: platforms must be one of 'cpu', 'cuda', 'rocm', 'tpu', got 'gpu'
    """
    check(isinstance(model, MemoryLM), "model", "a MemoryLM", type(model).__name__)
    check_model(model)
    check(bool(platforms) and not isinstance(platforms, str), "platforms", "a sequence of names", platforms)
    for platform in platforms:
        check_choice("platforms", platform, PLATFORMS)
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("export_model needs the package flatbuffers: pip install 'memformer-jax[export]'")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build, weights = _split(model)
    state, structure = _state_shapes(model)
    for name, function in (("prefill", _prefill), ("step", _step)):
        arguments = _abstract_arguments(name, model, weights, state)
        program = jax.jit(function(build, state, structure))
        exported = export.export(program, platforms=tuple(platforms))(*arguments)
        (folder / f"{name}.bin").write_bytes(exported.serialize())
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in weights.items()}
    np.savez(folder / "weights.npz", **arrays)
    manifest = {
        "format": 1,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes,
        "max_length": _longest(model),
        "weights": {name: {"shape": x.shape, "dtype": x.dtype.name} for name, x in weights.items()},
        "state": {name: {"shape": shape, "dtype": dtype.name} for name, (shape, dtype) in state.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.copyfile(str(serve.__file__), folder / "serve.py")


def _split(model: MemoryLM) -> tuple[Callable[[Arrays], MemoryLM], Arrays]:
    """A function that builds the model from its weights, and the weights by dotted path."""
    graph, streams, variables = nnx.split(model, nnx.RngState, ...)  # type: ignore[misc]
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(variables)}

    def build(weights: Arrays) -> MemoryLM:
        placed = [(path, variable.replace(weights[name])) for name, (path, variable) in flat.items()]
        return nnx.merge(graph, streams, nnx.from_flat_state(placed))

    return build, {name: variable.get_value() for name, (_, variable) in flat.items()}


def _state_shapes(model: MemoryLM) -> tuple[dict[str, tuple[tuple[int | str, ...], Any]], Any]:
    """Shapes, with "b" and "c" for batch and capacity, and dtypes of the arrays of the state; its structure."""

    def shapes(batch: int, capacity: int) -> Any:
        return jax.eval_shape(lambda: model.init_state(batch, capacity))

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes(1, 1))
    wider, longer = jax.tree.leaves(shapes(2, 1)), jax.tree.leaves(shapes(1, 2))
    found = {}
    for (path, x), more, rows in zip(leaves, wider, longer, strict=True):
        sizes = zip(x.shape, more.shape, rows.shape, strict=True)
        shape = tuple("b" if n != batch else "c" if n != capacity else n for n, batch, capacity in sizes)
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = (shape, x.dtype)
    return found, structure


def _longest(model: MemoryLM) -> int | None:
    """The most tokens of a sequence, None for any."""
    return model.config.max_length if model.config.positions == "learned" else None


def _abstract_arguments(name: str, model: MemoryLM, weights: Arrays, state: dict[str, Any]) -> list[Any]:
    """Shapes of the arguments of a program: weights, then ids and segment_ids or one token, then the state."""
    letters, longest = ["b"] if name == "step" else ["b", "t"], _longest(model)
    constraints = [] if name == "step" or longest is None else [f"t <= {longest}"]
    if any("c" in shape for shape, _ in state.values()):
        constraints += [] if name == "step" else ["c >= t"]
        letters.append("c")
    sizes = dict(zip(letters, export.symbolic_shape(",".join(letters), constraints=constraints), strict=True))

    def abstract(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(sizes.get(n, n) for n in shape), dtype)

    ids = [abstract("b", jnp.int32)] if name == "step" else [abstract("bt", jnp.int32)] * 2
    kinds = {name: abstract(x.shape, x.dtype) for name, x in weights.items()}
    return [kinds, *ids, {name: abstract(*x) for name, x in state.items()}]


def _prefill(build: Callable[[Arrays], MemoryLM], names: Any, structure: Any) -> Callable[..., Any]:
    def prefill(weights: Arrays, ids: Array, segment_ids: Array, state: Arrays) -> tuple[Array, Arrays]:
        before = structure.unflatten([state[name] for name in names])
        logits, after = read_prompts(build(weights), ids, segment_ids, before)
        return logits, dict(zip(names, jax.tree.leaves(after), strict=True))

    return prefill


def _step(build: Callable[[Arrays], MemoryLM], names: Any, structure: Any) -> Callable[..., Any]:
    def step(weights: Arrays, token: Array, state: Arrays) -> tuple[Array, Arrays]:
        before = structure.unflatten([state[name] for name in names])
        output = build(weights)(token[:, None], state=before)
        return output.logits[:, 0], dict(zip(names, jax.tree.leaves(output.state), strict=True))

    return step
