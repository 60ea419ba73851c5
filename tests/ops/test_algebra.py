"""Published memories as arguments of the ops: each against its paper's recurrence, a plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from memformer.layers.matrix import FEATURE_MAPS
from tests.numeric import assert_close

LENGTH, KEY, VALUE = 11, 6, 4


def draw():
    """Arguments of one head, [T, width]."""
    rng = np.random.default_rng(5)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return {
        "q": unit(rng.standard_normal((LENGTH, KEY))),
        "k": unit(rng.standard_normal((LENGTH, KEY))),
        "v": rng.standard_normal((LENGTH, VALUE)),
        "beta": rng.uniform(0, 1, LENGTH),
        "gate": rng.uniform(0, 1, (LENGTH, KEY)),
        "value_gate": rng.uniform(0, 1, (LENGTH, VALUE)),
        "head": -rng.uniform(0, 1, LENGTH),
        # As RWKV-7 bounds it.
        "channel": -np.exp(-0.5) * rng.uniform(0, 1, (LENGTH, KEY)),
    }


def loop(x, step):
    """Reads of a state S [K, V] that `step(S, t)` updates."""
    state, reads = np.zeros((KEY, VALUE)), []
    for t in range(LENGTH):
        state = step(state, t)
        reads.append(state.T @ x["q"][t])
    return np.stack(reads)


def comba(x):
    def step(S, t):
        S = np.exp(x["head"][t]) * S
        return S + x["beta"][t] * np.outer(x["k"][t], x["v"][t] - S.T @ (0.7 * x["k"][t]))

    return loop(x, step)


def gdn2(x):
    def step(S, t):
        k, decayed = x["k"][t], np.diag(np.exp(x["channel"][t])) @ S
        erased = np.eye(KEY) - np.outer(k, x["gate"][t] * k)
        return erased @ decayed + np.outer(k, x["value_gate"][t] * x["v"][t])

    return loop(x, step)


def rwkv7(x):
    """Its state is the transpose [V, K]: S (diag(w) - n^T (a * n)) + v^T k, with rows as vectors."""
    state, reads = np.zeros((VALUE, KEY)), []
    for t in range(LENGTH):
        n, a, k = x["k"][t], x["gate"][t], 0.5 * x["k"][t] + x["q"][t]
        state = state @ (np.diag(np.exp(x["channel"][t])) - np.outer(n, a * n)) + np.outer(x["v"][t], k)
        reads.append(state @ x["q"][t])
    return np.stack(reads)


def hgrn2(x):
    def step(S, t):
        forget = np.exp(x["channel"][t])
        return np.diag(forget) @ S + np.outer(1 - forget, x["v"][t])

    return loop(x, step)


def based(x):
    scores = x["q"] @ x["k"].T / np.sqrt(KEY)
    weights = np.tril(1 + scores + scores**2 / 2)
    return weights @ x["v"] / weights.sum(axis=1, keepdims=True)


def gsa(x):
    """Gated slot attention with a slot for each of the channels of `channel` and `gate`."""
    keys, values, reads = np.zeros((KEY, KEY)), np.zeros((KEY, VALUE)), []
    for t in range(LENGTH):
        f = np.exp(x["channel"][t])[:, None]
        keys, values = f * keys + (1 - f) * x["k"][t], f * values + (1 - f) * x["v"][t]
        weights = np.exp(keys @ x["q"][t])
        reads.append(weights / weights.sum() @ values)
    return np.stack(reads)


def mesa(x):
    """The least squares map of all writes so far, by NumPy's solver on the stacked rows."""
    reads = []
    for t in range(LENGTH):
        weight = x["beta"][: t + 1] * np.exp([np.sum(x["head"][i + 1 : t + 1]) for i in range(t + 1)])
        ridge = np.diag(np.sqrt(1 + x["gate"][t]))
        keys = np.concatenate([np.sqrt(weight)[:, None] * x["k"][: t + 1], ridge])
        values = np.concatenate([np.sqrt(weight)[:, None] * x["v"][: t + 1], np.zeros((KEY, VALUE))])
        reads.append(x["q"][t] @ np.linalg.lstsq(keys, values)[0])
    return np.stack(reads)


def mamba3(x):
    """Two taps per write: of the token before and of this one."""
    mix, size = x["beta"], x["gate"][:, 0]

    def step(S, t):
        S = np.exp(x["head"][t]) * S
        if t:
            S = S + (1 - mix[t]) * size[t] * np.exp(x["head"][t]) * np.outer(x["k"][t - 1], x["v"][t - 1])
        return S + mix[t] * size[t] * np.outer(x["k"][t], x["v"][t])

    return loop(x, step)


def call_comba(x, **options):
    return mf.delta_rule(x["q"], x["k"], x["v"], x["beta"], w=0.7 * x["k"], decay=x["head"], scale=1.0, **options)


def call_gdn2(x, **options):
    v, ones = x["value_gate"] * x["v"], jnp.ones_like(x["beta"])
    return mf.delta_rule(x["q"], x["k"], v, ones, w=x["gate"] * x["k"], decay=x["channel"], scale=1.0, **options)


def call_rwkv7(x, **options):
    n, zeros = x["k"], jnp.zeros_like(x["k"])
    pairs = [(x["gate"] * n, 0.5 * n + x["q"]), (jnp.zeros_like(x["v"]), x["v"]), (n * jnp.exp(-x["channel"]), zeros)]
    k, v, w = (jnp.stack(pair, axis=2) for pair in pairs)
    return mf.delta_product(x["q"], k, v, jnp.ones((1, LENGTH, 2, 1)), w=w, decay=x["channel"], scale=1.0, **options)


def call_hgrn2(x, **options):
    return mf.linear_attention(x["q"], 1 - jnp.exp(x["channel"]), x["v"], decay=x["channel"], scale=1.0, **options)


def call_based(x, **options):
    q, k = (FEATURE_MAPS["taylor"](x[name]) for name in "qk")
    return mf.linear_attention(q, k, x["v"], normalize=True, **options)


def call_gsa(x, **options):
    """As the layer calls it: a slot is a value head of width 1."""
    decay, same = x["channel"], {"scale": 1.0, **options}
    written = 1 - jnp.exp(decay)
    scores, _ = mf.linear_attention(x["q"], x["k"], written[:, :, 0, :, None], decay=decay[:, :, 0], **same)
    return mf.linear_attention(jax.nn.softmax(scores[..., 0])[:, :, None], written, x["v"], decay=decay, **same)


def call_mamba3(x, **options):
    def before(a):
        return jnp.pad(a[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (a.ndim - 2)))

    size, decay = x["gate"][..., 0], x["head"]
    now, earlier = x["beta"] * size, (1 - x["beta"]) * size
    written = (earlier + before(now))[..., None] * before(x["v"])
    o, state = mf.linear_attention(x["q"], before(x["k"]), written, decay=before(decay), scale=1.0, **options)
    match = now * jnp.sum(x["q"] * x["k"], axis=-1)
    return jnp.exp(decay)[..., None] * o + match[..., None] * x["v"], state


def call_mesa(x, **options):
    return mf.mesa(x["q"], x["k"], x["v"], x["beta"], 1 + x["gate"], decay=x["head"], **options)


MEMORIES = {
    "comba": (comba, call_comba),
    "gdn2": (gdn2, call_gdn2),
    "rwkv7": (rwkv7, call_rwkv7),
    "hgrn2": (hgrn2, call_hgrn2),
    "based": (based, call_based),
    "gsa": (gsa, call_gsa),
    "mesa": (mesa, call_mesa),
    "mamba3": (mamba3, call_mamba3),
}


FORMS = ({"implementation": "recurrent"}, {"implementation": "chunked", "chunk_size": 4})


@pytest.mark.parametrize("name", MEMORIES)
def test_against_the_paper(name):
    reference, call = MEMORIES[name]
    x = draw()
    want = reference(x)
    with jax.enable_x64(True):
        wide = {key: value[None, :, None] for key, value in x.items()}
        outputs = jax.jit(lambda x: [call(x, **form)[0] for form in FORMS])(wide)
    for form, output in zip(FORMS, outputs, strict=True):
        assert output.dtype == jnp.float64
        assert_close(np.asarray(output)[0, :, 0], want, 1e-12, f"{name} {form}")
