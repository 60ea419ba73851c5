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
    """Contents and reads of each memory after each write, by the ops."""
    import jax
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

    @jax.jit
    def run(q, k, v):
        linear, _ = mf.linear_attention(q, k, v, scale=1.0)
        delta, _ = mf.delta_rule(q, k, v, jnp.ones((rows, steps, 1)), scale=1.0)
        softmax, _ = mf.softmax_attention(q, k, v, scale=8.0)
        former, cache = mf.deltaformer(q, k, v, write_kernel="round", read_kernel="round")
        return linear, delta, softmax, former, cache.u

    linear, delta, softmax, former, u = run(q, k, v)
    matrices = [("linear_attention", "linear attention", linear), ("delta_rule", "delta rule", delta)]
    caches = [("softmax_attention", "softmax attention", softmax, v), ("deltaformer", "DeltaFormer", former, u)]
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


def test_docstrings_of_the_api_pages():
    pytest.importorskip("griffe")
    for_pages = load_module(DOCS / "docstrings.py").for_pages
    assert (
        for_pages("Args:\n  a, b: of\n    both.\n  c: x.") == "Args:\n  a: of\n    both.\n  b: of\n    both.\n  c: x."
    )
    assert for_pages("Example:\n  >>> f()") == "Examples:\n  >>> f()"
    assert 'identifier="memformer.ops"' in for_pages("See `memformer.ops`.")
    assert for_pages("Sums a, b: both of `x`.") == "Sums a, b: both of `x`."


def code_blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(blocks: list[str], page: str) -> dict:
    """Runs blocks in one namespace, with the defaults of jax that a notebook has."""
    import jax

    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    return names


def test_the_code_of_the_start_page_runs(capsys):
    blocks = [block for block in code_blocks("index.md") if "load_run" not in block]
    run_blocks(blocks, "index.md")
    # as the comments beside the prints say
    shown = capsys.readouterr().out.split("\n")[:2]
    assert shown == ["[4. 2. 0. 0.]", "[3. 2. 0. 0.]"]
    assert all(f"# {line}" in blocks[0] for line in shown)


def test_the_code_of_the_notebook_page_runs(capsys):
    """Traced, in a quarter of the time of running it: the page says shapes, and test_ops tests the values."""
    import jax

    blocks = [block for block in code_blocks("notebook.md") if "load_run" not in block]
    logits = jax.eval_shape(lambda: run_blocks(blocks, "notebook.md")["logits"])
    assert capsys.readouterr().out.startswith("(2, 16, 4, 32) (2, 4, 32, 32)\n") and logits.shape == (1, 16, 100)


def test_the_start_page_shows_the_table_of_the_readme():
    (table,) = re.findall(r"^```text\n.*?^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table in (ROOT / "README.md").read_text()


def test_a_memory_of_ones_own(tmp_path, monkeypatch):
    from memformer.layers import MEMORIES
    from memformer.training.config import complete_config

    module, use = code_blocks("add_memory.md")
    (tmp_path / "my_memories.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    try:
        run_blocks([use], "add_memory.md")
        # a new process that reads the config of a run
        del sys.modules["my_memories"], MEMORIES["moving_average"]
        complete_config(
            {"task_module": "my_memories", "model": {"memory": "moving_average,softmax_attention", "depth": 2}}
        )
        assert "moving_average" in MEMORIES
    finally:
        sys.modules.pop("my_memories", None)
        MEMORIES.pop("moving_average", None)


def rows(page: str) -> list[tuple[str, str]]:
    """Their names and ours, of all tables of a page."""
    lines = re.findall(r"^\| (.+?) \| (.+?) \|$", (DOCS / page).read_text(), re.MULTILINE)
    return [line for line in lines if not line[0].startswith("---")]


def test_names_of_coming_from_fla():
    import inspect

    import memformer as mf
    from memformer.layers import MEMORIES, known_options

    table = rows("from_fla.md")
    assert len(table) > 40
    for _, ours in table:
        for name, arguments in re.findall(r"mf\.(\w+)(?:\((.*?)\)`)?", ours):
            keywords = re.findall(r"(\w+)=", arguments)
            assert set(keywords) <= set(inspect.signature(getattr(mf, name)).parameters), (name, keywords)
    memories = [re.match(r"`(\w+)`", ours)[1] for theirs, ours in table if re.fullmatch(r"`[A-Z]\w+`", theirs)]
    assert len(memories) == 19 and set(memories) <= set(MEMORIES)
    options = {"unit_keys", "unit_queries", "beta_limit", "decay", "conv_width"}
    assert options <= set(known_options("delta_rule")) and "write_kernel" in known_options("deltaformer")


def test_names_of_coming_from_maxtext():
    from memformer.layers import known_options
    from memformer.training.config import default_config

    config = default_config(task="lm")
    ours = [name for _, cell in rows("from_maxtext.md") for name in re.findall(r"`([^`]+)`", cell)]
    keys = [name for name in ours if re.fullmatch(r"(task|data|model|optimizer|train|mesh|checkpoint)\.\w+", name)]
    assert len(keys) > 40
    for key in keys:
        section, name = key.split(".")
        assert name in config[section], key
    assert {"seed", "init_from"} <= set(config)
    assert {"groups", "window", "sinks"} <= set(known_options("softmax_attention"))
    assert "groups" in known_options("deltaformer")


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
