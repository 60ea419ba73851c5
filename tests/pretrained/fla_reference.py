"""Models of flash-linear-attention in NumPy, float64, from their keys and equations; sources are named per memory."""

import numpy as np

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 24}
GROUPED = {**SIZES, "head_dim": 6, "num_v_heads": 4}

# Fields of config.json by name of the model.
MODELS = {
    "DeltaNet": {**SIZES, "expand_k": 0.75, "allow_neg_eigval": True, "tie_word_embeddings": True},
    "GatedDeltaNet": {**GROUPED, "expand_v": 1.5, "output_gate_activation": "sigmoid", "conv_size": 3},
    "GLA": {**SIZES, "norm_eps": 1e-3},
    "RetNet": SIZES,
    "KDA": {**GROUPED, "expand_v": 1.5, "norm_eps": 1e-5},
}


def architecture(name: str) -> str:
    return f"{name}ForCausalLM"


def sizes(name: str, config: dict) -> tuple[int, int, int, int]:
    """Key heads, value heads, and key and value width per head."""
    heads = config["num_heads"]
    if "head_dim" in config:
        width, expand = config["head_dim"], config.get("expand_v", 1.0 if name == "KDA" else 2.0)
        return heads, config.get("num_v_heads") or heads, width, int(width * expand)
    defaults = {"GLA": (0.5, 1.0), "RetNet": (1.0, 2.0)}.get(name, (1.0, 1.0))
    key, value = (
        round(config["hidden_size"] * config.get(field, default)) // heads
        for field, default in zip(("expand_k", "expand_v"), defaults, strict=True)
    )
    return heads, heads, key, value


def shapes(name: str, config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, as the modules of the package make them."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    groups, heads, key, value = sizes(name, config)
    found = {"model.embeddings.weight": (VOCAB, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (VOCAB, width)
    memory = {
        "q_proj.weight": (groups * key, width), "k_proj.weight": (groups * key, width),
        "v_proj.weight": (heads * value, width), "o_proj.weight": (width, heads * value),
    }  # fmt: skip
    if name in ("DeltaNet", "GatedDeltaNet", "KDA"):
        taps = config.get("conv_size", 4)
        channels = {"q": groups * key, "k": groups * key, "v": heads * value}
        memory |= {f"{part}_conv1d.weight": (size, 1, taps) for part, size in channels.items()}
    if name in ("DeltaNet", "GatedDeltaNet", "KDA"):
        memory |= {"b_proj.weight": (heads, width), "o_norm.weight": (value,)}
    if name in ("GLA", "RetNet"):
        memory |= {"g_proj.weight": (heads * value, width), "g_norm_swish_gate.weight": (value,)}
    if name == "GatedDeltaNet":
        memory |= {"g_proj.weight": (heads * value, width), "a_proj.weight": (heads, width)}
        memory |= {"A_log": (heads,), "dt_bias": (heads,)}
    if name == "GLA":
        memory |= {"gk_proj.0.weight": (16, width), "gk_proj.1.weight": (heads * key, 16)}
        memory["gk_proj.1.bias"] = (heads * key,)
    if name == "KDA":
        memory |= {"f_proj.0.weight": (value, width), "f_proj.1.weight": (heads * key, value)}
        memory |= {"g_proj.0.weight": (value, width), "g_proj.1.weight": (heads * value, value)}
        memory |= {"g_proj.1.bias": (heads * value,), "A_log": (heads,), "dt_bias": (heads * key,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.attn.{key}": shape for key, shape in memory.items()}
        found |= {f"{layer}.attn_norm.weight": (width,), f"{layer}.mlp_norm.weight": (width,)}
        found |= {f"{layer}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
    return found


def random_tensors(name: str, config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    tensors = {}
    for key, shape in shapes(name, config).items():
        x = draw.normal(size=shape)
        # norms about 1, rates and biases about 0, maps of gain 2
        tensors[key] = 1 + 0.2 * x if "norm" in key else 0.5 * x if len(shape) == 1 else 2 * x * shape[-1] ** -0.5
    return {key: x.astype(np.float32) for key, x in tensors.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(x, 0)


def rms(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def recurrence(q, k, v, beta=None, decay=None):
    """S = exp(g) S; S += k (beta (v - S^T k))^T, or k v^T without beta; o = S^T q / sqrt(K). [B, T, H, K], float64."""
    shared = v.shape[2] // q.shape[2]
    q, k = np.repeat(q, shared, axis=2) * q.shape[-1] ** -0.5, np.repeat(k, shared, axis=2)
    state, out = np.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1])), np.zeros(v.shape)
    for t in range(q.shape[1]):
        if decay is not None:
            state = state * np.exp(decay[:, t]).reshape(*decay.shape[:1], decay.shape[2], -1, 1)
        written = v[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (written - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t][..., None] * written[:, :, None]
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return out


def retention_decay(heads: int, like: np.ndarray):
    """log(1 - 2^(-5 - h)) of every token."""
    return np.broadcast_to(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), (*like.shape[:2], heads))


def rotate(x):
    """Rotary positions of base 1e4; channel i is paired with channel i + K / 2."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * 1e4 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def memory(name: str, config: dict, part, x):
    """The layer of a model; `part` gives its tensors by key."""
    epsilon = config.get("norm_eps", 1e-6)
    groups, heads, key, value = sizes(name, config)
    parts = {}
    for letter, count, width in (("q", groups, key), ("k", groups, key), ("v", heads, value)):
        y = x @ part(f"{letter}_proj.weight").T
        taps = part(f"{letter}_conv1d.weight")
        if taps is not None:
            size = taps.shape[-1]
            padded = np.pad(y, ((0, 0), (size - 1, 0), (0, 0)))
            y = silu(sum(padded[:, j : j + y.shape[1]] * taps[:, 0, j] for j in range(size)))
        parts[letter] = y.reshape(*y.shape[:2], count, width)
    q, k, v = parts.values()
    beta = decay = None
    if name in ("DeltaNet", "GatedDeltaNet", "KDA"):
        q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
        beta = sigmoid(x @ part("b_proj.weight").T) * (2 if config.get("allow_neg_eigval") else 1)
    if name == "GatedDeltaNet":
        decay = -np.exp(part("A_log")) * softplus(x @ part("a_proj.weight").T + part("dt_bias"))
    if name == "KDA":
        step = softplus(x @ part("f_proj.0.weight").T @ part("f_proj.1.weight").T + part("dt_bias"))
        decay = -np.exp(part("A_log"))[:, None] * step.reshape(*x.shape[:2], heads, key)
    if name == "GLA":
        logits = x @ part("gk_proj.0.weight").T @ part("gk_proj.1.weight").T + part("gk_proj.1.bias")
        decay = -softplus(-logits).reshape(*x.shape[:2], heads, key) / 16
    if name == "RetNet":
        q, k, decay = rotate(q), rotate(k), retention_decay(heads, x)
    read = recurrence(q, k, v, beta, decay)
    read = rms(read, part("o_norm.weight" if beta is not None else "g_norm_swish_gate.weight"), epsilon)
    if name == "KDA":
        gate = sigmoid(x @ part("g_proj.0.weight").T @ part("g_proj.1.weight").T + part("g_proj.1.bias"))
    elif part("g_proj.weight") is not None:
        gate = (sigmoid if config.get("output_gate_activation") == "sigmoid" else silu)(x @ part("g_proj.weight").T)
    else:
        gate = np.ones((*x.shape[:2], heads * value))
    return (read.reshape(gate.shape) * gate) @ part("o_proj.weight").T


def logits(name: str, config: dict, tensors: dict, ids: np.ndarray) -> np.ndarray:
    weights = {key: x.astype(np.float64) for key, x in tensors.items()}
    epsilon = config.get("norm_eps", 1e-6)
    x = weights["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = rms(x, weights[f"{layer}.attn_norm.weight"], epsilon)
        x = x + memory(name, config, lambda key, layer=layer: weights.get(f"{layer}.attn.{key}"), y)
        y = rms(x, weights[f"{layer}.mlp_norm.weight"], epsilon)
        gate, up, down = (weights[f"{layer}.mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        x = x + (silu(y @ gate) * (y @ up)) @ down
    return (
        rms(x, weights["model.norm.weight"], epsilon)
        @ weights.get("lm_head.weight", weights["model.embeddings.weight"]).T
    )
