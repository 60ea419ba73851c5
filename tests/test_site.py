"""The site: its figure has the numbers of the ops, its guides name what exists, and every study has a card.

`python tests/test_site.py --write` computes docs/assets/memory.json anew. CI builds the whole site strictly (.ci/run).
"""

import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
FIGURE = DOCS / "assets" / "memory.json"
KEYS, WIDTH = 12, 8
# every key once, then four of them with a new value
ORDER = [*range(KEYS), 2, 5, 2, 0]
DIGITS = 4


def spread_keys() -> np.ndarray:
    """Unit keys with no two close: the largest cosines are pushed apart."""
    keys = np.random.default_rng(0).normal(size=(KEYS, WIDTH))
    for _ in range(3000):
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        cosines = keys @ keys.T - np.eye(KEYS)
        keys -= 0.05 * (cosines / np.abs(cosines).max()) ** 7 @ keys
    return np.round(keys / np.linalg.norm(keys, axis=1, keepdims=True), DIGITS)


def compute_figure(keys: np.ndarray, values: np.ndarray) -> list[dict]:
    """What each memory stores and returns after each write, by the ops."""
    import jax.numpy as jnp

    import memformer as mf

    steps = len(ORDER)
    # one row per query, the same at every step: the keys, then unit vectors, which read a matrix row by row
    queries = np.concatenate([keys, np.eye(WIDTH)])
    rows = len(queries)
    q = jnp.asarray(np.broadcast_to(queries[:, None, None], (rows, steps, 1, WIDTH)), jnp.float32)
    k, v = (
        jnp.asarray(np.broadcast_to(x[None, :, None], (rows, steps, 1, WIDTH)), jnp.float32)
        for x in (keys[ORDER], values)
    )
    last = np.array([[max((i for i in range(t + 1) if ORDER[i] == key), default=-1) for key in range(KEYS)]
                     for t in range(steps)])  # fmt: skip

    def errors(output):
        gaps = np.linalg.norm(np.asarray(output)[:KEYS, :, 0].transpose(1, 0, 2) - values[last], axis=-1)
        return [[round(float(e), DIGITS) if i >= 0 else None for e, i in zip(*row, strict=True)]
                for row in zip(gaps, last, strict=True)]  # fmt: skip

    def rounded(array):
        return np.round(np.asarray(array, np.float64), DIGITS).tolist()

    linear, _ = mf.linear_attention(q, k, v, scale=1.0)
    delta, _ = mf.delta_rule(q, k, v, jnp.ones((rows, steps, 1)), scale=1.0)
    softmax, _ = mf.softmax_attention(q, k, v, scale=8.0)
    former, cache = mf.deltaformer(q, k, v, write_kernel="round", read_kernel="round")
    matrices = [("linear_attention", "linear attention", linear), ("delta_rule", "delta rule", delta)]
    caches = [("softmax_attention", "softmax attention", softmax, v), ("deltaformer", "DeltaFormer", former, cache.u)]
    return [
        {"name": name, "label": label, "errors": errors(o), "states": rounded(o[KEYS:, :, 0].transpose(1, 0, 2))}
        for name, label, o in matrices
    ] + [
        {"name": name, "label": label, "errors": errors(o), "cache": rounded(u[0, :, 0])}
        for name, label, o, u in caches
    ]


def write() -> None:
    """Draws keys and values and writes the figure's numbers."""
    values = np.random.default_rng(1).normal(size=(len(ORDER), WIDTH))
    values = np.round(values / np.linalg.norm(values, axis=1, keepdims=True), DIGITS)
    keys = spread_keys()
    content = {
        "order": ORDER, "keys": keys.tolist(), "values": values.tolist(), "memories": compute_figure(keys, values),
    }  # fmt: skip
    FIGURE.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def test_the_figure_has_the_numbers_of_the_ops():
    content = json.loads(FIGURE.read_text())
    keys, values = np.array(content["keys"]), np.array(content["values"])
    assert content["order"] == ORDER
    cosines = np.abs(keys @ keys.T - np.eye(KEYS))
    assert cosines.max() < 0.25, "the page says so"
    found = compute_figure(keys, values)
    for stored, computed in zip(content["memories"], found, strict=True):
        assert stored.keys() == computed.keys() and stored["name"] == computed["name"]
        for part in stored.keys() - {"name", "label"}:
            both = [np.array(memory[part], float) for memory in (stored, computed)]
            np.testing.assert_allclose(*both, atol=2 * 10**-DIGITS, err_msg=f"{stored['name']}: {part}")
    # what the page says of them
    linear, delta, softmax, former = (np.array(memory["errors"], float) for memory in found)
    assert np.nanmax(former) < 1e-3 and np.nanmax(softmax[:KEYS]) < 0.05 < np.nanmax(softmax[KEYS:])
    written = np.arange(len(ORDER)), ORDER
    assert delta[written].max() < 1e-3 and linear[written][KEYS:].min() > 0.5


def test_every_study_has_a_card():
    pytest.importorskip("mkdocs")
    from memformer.lab import STUDIES

    hooks = load_module(DOCS / "hooks.py")
    results = (DOCS / "results.md").read_text()
    page = hooks.gallery(results)
    shown = re.findall(r"\{ #(\w+) \}$", page, re.MULTILINE)
    assert shown == [name for name in STUDIES if (DOCS / "results" / f"{name}.json").exists()]
    assert len(re.findall(r"^python -m memformer\.lab ", page, re.MULTILINE)) == len(shown)
    with pytest.raises(ValueError, match="'No verdict'"):
        hooks.gallery("## No verdict\n\nClaim: none.\n")


def load_module(path: pathlib.Path):
    """A module that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    sys.path.insert(0, str(ROOT))
    write()
