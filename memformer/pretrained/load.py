"""Loads pretrained models, tensor by tensor, into the shards of a mesh; plans a load without reading weights."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from memformer.core.checks import check_size
from memformer.data.tokenizer import BYTES_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from memformer.layers.sharding import RULES, partition_spec
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import MemoryLM
from memformer.pretrained.architectures.rules import Rule
from memformer.pretrained.folder import open_tensors, read_config, read_index
from memformer.pretrained.table import Architecture, find_architecture

__all__ = ["LoadingPlan", "load_pretrained", "plan_loading", "read_model_config", "read_parameters"]

# Names of one message: a checkpoint of another model differs in thousands.
MOST_NAMES = 20


@dataclasses.dataclass(frozen=True)
class LoadingPlan:
    """Sizes of a load, in bytes.

    Attributes:
      parameters: number of parameters.
      checkpoint: bytes of all tensors in the checkpoint.
      read: bytes that a host reads, at most; hosts read the parts that their devices hold.
      held: bytes of parameters that a device holds.
      largest: bytes of the largest group of tensors that is converted at once, which a host holds beside its shards.
    """

    parameters: int
    checkpoint: int
    read: int
    held: int
    largest: int


def load_pretrained(
    folder: str | pathlib.Path, *, dtype: Any = None, param_dtype: Any = None, mesh: Mesh | None = None
) -> tuple[MemoryLM, Tokenizer | None, dict[str, Any]]:
    """Loads a Hugging Face folder: config.json and safetensors, in one file or sharded.

    Tensors are memory-mapped and converted one by one, each straight into its shards: there are never two whole copies,
    and a host reads what its devices hold.

    Args:
      folder: of the model; `memformer.pretrained.ARCHITECTURES` lists what config.json may name.
      dtype: of activations; None is that of the checkpoint (float16 becomes float32).
      param_dtype: of parameters; None is `dtype`.
      mesh: places parameters by their logical axes ("fsdp" and "tensor" where the mesh has axes of these names); None
        leaves them on the default device.

    Returns:
      The model, its tokenizer (None where the folder has no tokenizer.json), and the contents of config.json.

    Raises:
      ValueError: another architecture or a config that the layers cannot express; tensors that are missing, unexpected
        or of another shape, listed by name.
      ImportError: the folder has a tokenizer.json, and tokenizers is not installed (the extra `hf`).

    Example:
      >>> load_pretrained("no/such/folder")
      Traceback (most recent call last):
      ...
      ValueError: folder must contain config.json, as Hugging Face models do; no/such/folder has none
    """
    config, vocab = read_model_config(folder, dtype=dtype, param_dtype=param_dtype)
    graph, variables = _skeleton(config, vocab)
    for name, array in read_parameters(folder):
        variables[name] = variables[name].replace(_place(array, _leaf(variables[name]), mesh))
    state = nnx.from_flat_state([(_path(name), variable) for name, variable in variables.items()])
    has_tokenizer = any((pathlib.Path(folder) / name).is_file() for name in (TOKENIZER_FILE, BYTES_FILE))
    return nnx.merge(graph, state), load_tokenizer(str(folder)) if has_tokenizer else None, read_config(folder)


def read_model_config(
    folder: str | pathlib.Path, *, dtype: Any = None, param_dtype: Any = None
) -> tuple[LanguageModelConfig, int]:
    """The config of a pretrained model and its number of ids, from config.json alone.

    Args:
      folder, dtype, param_dtype: as for `load_pretrained`.

    Raises:
      ValueError: another architecture, or a config that the layers cannot express.
    """
    raw = read_config(folder)
    return _convert(raw, find_architecture(raw)[1], dtype, param_dtype)


def read_parameters(folder: str | pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters of a pretrained model by dotted path, converted one rule at a time.

    Where a conversion needs no arithmetic the arrays are views of the memory-mapped files: what is not copied out of
    them is never read.

    Raises:
      ValueError: tensors that are missing, unexpected or of another shape, listed by name, before the first parameter.
    """
    raw = read_config(folder)
    _, architecture = find_architecture(raw)
    config, vocab = _convert(raw, architecture, None, None)
    tensors, rules = _named(open_tensors(folder), architecture, config), architecture.rules(config)
    expected = tensor_shapes(rules, abstract_parameters(config, vocab))
    _check_names(expected, tensors, architecture)
    _check_shapes(expected, tensors)
    for rule in rules:
        arrays = rule.load(*(tensors[key] for key in rule.keys))
        yield from zip(rule.parameters, arrays, strict=True)


def plan_loading(
    folder: str | pathlib.Path,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Mesh | AbstractMesh | None = None,
    devices_per_host: int | None = None,
) -> LoadingPlan:
    """Plans a load from config.json alone: bytes read and held; names are checked too where the folder has an index.

    Args:
      folder: with config.json; weights need not be there.
      dtype, param_dtype: as for `load_pretrained`.
      mesh: as for `load_pretrained`; an AbstractMesh serves for devices that are not here.
      devices_per_host: None is all devices of the mesh on one host.

    Raises:
      ValueError: as `load_pretrained`.

    Example:
      >>> import json, pathlib, tempfile
      >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
      >>> config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "dtype": "bfloat16", **sizes}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     plan = plan_loading(folder, mesh=jax.sharding.AbstractMesh((4,), ("fsdp",)), devices_per_host=2)
      >>> plan.parameters, plan.checkpoint, plan.held
      (95040, 190080, 48000)
    """
    raw = read_config(folder)
    _, architecture = find_architecture(raw)
    config, vocab = _convert(raw, architecture, dtype, param_dtype)
    leaves = abstract_parameters(config, vocab)
    rules = architecture.rules(config)
    expected = tensor_shapes(rules, leaves)
    index = read_index(folder)
    if index is not None:
        _check_names(expected, _named(dict.fromkeys(index), architecture, config), architecture)
    width = jnp.dtype(_checkpoint_dtype({**raw.get("text_config", {}), **raw})).itemsize
    devices = 1 if mesh is None else math.prod(mesh.shape.values())
    here = devices if devices_per_host is None else check_size("devices_per_host", devices_per_host)
    parameters = read = held = 0
    for leaf in leaves.values():
        size = math.prod(leaf.shape)
        shard = size // _parts(leaf, mesh)
        parameters += size
        held += shard * leaf.dtype.itemsize
        read += min(size, shard * here) * width
    groups = [sum(math.prod(expected[key]) for key in rule.keys) for rule in rules]
    checkpoint = sum(math.prod(shape) for shape in expected.values()) * width
    return LoadingPlan(parameters, checkpoint, read, held, max(groups) * width)


def tensor_shapes(rules: list[Rule], leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint, from the parameters and the inverse conversions."""

    def save(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        saved: dict[str, Any] = {}
        for rule in rules:
            result = rule.save(*(values[name] for name in rule.parameters))
            saved.update(zip(rule.keys, result, strict=True))
        return saved

    # one trace for all rules
    saved = jax.eval_shape(save, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()})
    return {key: x.shape for key, x in saved.items()}


def _convert(
    raw: Mapping[str, Any], architecture: Architecture, dtype: Any, param_dtype: Any
) -> tuple[LanguageModelConfig, int]:
    # models that also see keep the fields of their language model apart
    raw = {**raw.get("text_config", {}), **raw}
    dtype = _checkpoint_dtype(raw, half=False) if dtype is None else dtype
    dtypes = {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    try:
        return LanguageModelConfig(**architecture.fields(raw), **dtypes), raw["vocab_size"]
    except KeyError as error:
        raise ValueError(f"config.json must have the field {error.args[0]!r}") from None


def _checkpoint_dtype(raw: Mapping[str, Any], half: bool = True) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return "float32" if name == "float16" and not half else name


def _skeleton(config: LanguageModelConfig, vocab: int) -> tuple[Any, dict[str, nnx.Variable]]:
    """The structure of a model and its variables by dotted path, as shapes."""
    # Flax would shard each parameter by its names alone, on the mesh of the context.
    with nnx.use_eager_sharding(False), nnx.logical_axis_rules([(name, None) for name, _ in RULES]):
        graph, state = nnx.split(nnx.eval_shape(lambda: MemoryLM(config, vocab_size=vocab, rngs=nnx.Rngs(0))))
    return graph, {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


class Leaf(NamedTuple):
    """A parameter as shape, dtype and logical names of its axes."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    names: tuple[str | None, ...] | None


def _leaf(variable: nnx.Variable) -> Leaf:
    value = variable.get_value()
    return Leaf(value.shape, value.dtype, variable.get_metadata().get("out_sharding"))


def abstract_parameters(config: LanguageModelConfig, vocab: int) -> dict[str, Leaf]:
    """The parameters of a model by dotted path; one group of layers is traced for all, which deep models need."""
    size = len(config.pattern)
    repeats = config.depth > size and not config.dense_layers
    _, variables = _skeleton(dataclasses.replace(config, scan_layers=True) if repeats else config, vocab)
    leaves = {}
    for name, variable in variables.items():
        leaf, parts = _leaf(variable), name.split(".")
        if not repeats or parts[0] != "blocks":
            leaves[name] = leaf
            continue
        names = leaf.names[1:] if leaf.names and len(leaf.names) == len(leaf.shape) else None
        for group in range(leaf.shape[0]):
            path = ".".join(("blocks", str(group * size + int(parts[1])), *parts[2:]))
            leaves[path] = Leaf(leaf.shape[1:], leaf.dtype, names)
    return leaves


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _named(tensors: Mapping[str, Any], architecture: Architecture, config: LanguageModelConfig) -> dict[str, Any]:
    """Tensors under the names of the whole model: the bare model's lack the prefix, and a tied read-out is dropped."""
    prefix, ignored = architecture.prefix, re.compile(architecture.ignored)
    bare = not any(name.startswith(prefix) for name in tensors)
    named = {}
    for name, tensor in tensors.items():
        name = prefix + name if bare and name != "lm_head.weight" else name
        for old, new in architecture.renames:
            name = re.sub(old, new, name)
        if not ignored.fullmatch(name) and not (config.tie_embeddings and name == "lm_head.weight"):
            named[name] = tensor
    return named


def _check_names(expected: Collection[str], tensors: Collection[str], architecture: Architecture) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise ValueError(
            f"the checkpoint must have the tensors of a {architecture.model_type} as config.json describes it, got "
            f"{' and '.join(faults)}"
        )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]) -> None:
    wrong = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        more = ", ..." if len(wrong) > MOST_NAMES else ""
        raise ValueError(f"tensors must have the shapes of config.json, got {'; '.join(wrong[:MOST_NAMES])}{more}")


def _parts(leaf: Leaf, mesh: Mesh | AbstractMesh | None) -> int:
    """Number of different shards of a parameter."""
    if mesh is None:
        return 1
    axes = jax.tree.leaves(tuple(partition_spec(leaf.names, leaf.shape, mesh)))
    return math.prod(mesh.shape[axis] for axis in axes)


def _place(array: np.ndarray, leaf: Leaf, mesh: Mesh | None) -> jax.Array:
    """The parameter's shards, each copied out of the memory-mapped file by itself."""

    def shard(index: Any) -> np.ndarray:
        # A copy: a view would hold the file, which may be overwritten.
        return np.array(array[index], dtype=leaf.dtype, order="C")

    if mesh is None:
        return jnp.asarray(shard(...))
    sharding = NamedSharding(mesh, partition_spec(leaf.names, leaf.shape, mesh))
    return jax.make_array_from_callback(leaf.shape, sharding, shard)
