"""The README is run: its commands, its notebook lines, its tables.

`python tests/test_readme.py --write` writes the table of memories anew.
"""

import pathlib
import re
import shlex
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q "
PYTHON = ".venv/bin/python "
# The first columns of the table that ends a run of the swap task.
HEAD = ["memory", "steps", "loss", "accuracy"]
BEGIN, END = re.compile(r"<!-- memories: .*? -->\n"), "<!-- end of memories -->"


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def table() -> str:
    """The table of memories, shortened to what a first look needs."""
    from memformer.layers.table import MEMORIES

    rows = ["| memory | similarity | erase | forget | state |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{name}` | {row.similarity} | {row.erase} | {row.forget} | {row.state} |" for name, row in MEMORIES.items()
    ]
    return "\n".join(rows) + "\n"


def write() -> None:
    """Writes the table of memories into the README."""
    text = README.read_text()
    begin = BEGIN.search(text)
    assert begin is not None
    README.write_text(text[: begin.end()] + table() + text[text.index(END) :])


def test_table_of_memories():
    text = README.read_text()
    begin = BEGIN.search(text)
    assert text[begin.end() : text.index(END)] == table(), "run: python tests/test_readme.py --write"


def test_notebook():
    import jax

    import memformer as mf

    (source,) = blocks("python")
    assert 8 <= len(source.strip().splitlines()) <= 12

    # one program: each operation by itself would be compiled alone
    @jax.jit
    def run():
        names: dict = {}
        exec(compile(source, str(README), "exec"), names)
        q, k, v, beta, decay = (names[name][:, 5:] for name in ("q", "k", "v", "beta", "decay"))
        alone, _ = mf.delta_rule(q, k, v, beta, decay=decay)
        shown = {name: names[name] for name in ("o", "packed", "last", "state", "slope", "k")}
        return shown, alone

    # A notebook has jax's own defaults, not the strict ones of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names, alone = run()
    whole, packed = names["o"], names["packed"]
    # decoding continues after the first seven tokens
    np.testing.assert_allclose(names["last"], whole[:, 7:], atol=1e-5)
    # the packed sequences are what each is alone
    np.testing.assert_allclose(packed[:, :5], whole[:, :5], atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5)
    assert np.max(np.abs(packed[:, 5:] - whole[:, 5:])) > 1e-2
    assert names["state"].shape == (1, 4, 64, 64) and names["slope"].shape == names["k"].shape
    assert np.all(np.isfinite(names["slope"]))


def commands() -> dict[str, str]:
    """The README's commands by what they do; each block holds one, but that of one's own text (test_road.py)."""
    first, second, _, tests = (block.strip() for block in blocks("bash"))
    return {"train": first, "twin": second, "test": tests}


def test_commands_are_one_line_each():
    found = commands()
    assert all("\n" not in command for command in found.values())
    assert found["train"].startswith(f"{INSTALL}'.[train]' && {PYTHON}train.py ")
    assert found["twin"].startswith(f"{PYTHON}train.py ")
    assert found["test"].startswith(f"{INSTALL}'.[test]' && {PYTHON}-m pytest ")


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == commands()["test"]


def test_the_table_has_both_runs():
    found = commands()
    memories = ["deltaformer", found["twin"].split("memory=")[1].split()[0]]
    head, *rows = [line.split() for line in blocks("text")[0].splitlines()]
    assert head[: len(HEAD)] == HEAD
    assert [row[0] for row in rows] == memories


def test_training_command_in_short(tmp_path):
    from tests.processes import run_script

    words = shlex.split(commands()["train"].split("&& ")[-1])
    assert words[:2] == [PYTHON.strip(), "train.py"]
    short = [
        "--config.model.width=16",
        "--config.model.heads=1",
        "--config.task.length=8",
        "--config.train.steps=2",
        "--config.train.batch_size=4",
        "--config.train.log_every=1",
        "--config.train.eval_every=0",
        "--config.train.final_lengths=(4,)",
        "--config.train.final_batches=1",
        f"--workdir={tmp_path / 'run'}",
    ]
    run = run_script(*words[1:], *short)
    assert run.returncode == 0, run.stdout + run.stderr
    # the table that ends a run has the columns that the README shows, but for the lengths left out here
    lines = [line.split() for line in run.stdout.splitlines()]
    (start,) = (i for i, line in enumerate(lines) if line[:2] == ["memory", "steps"])
    assert lines[start] == [*HEAD, "at", "4"] and lines[start + 1][0] == "deltaformer"
    assert (tmp_path / "run" / "result.json").exists()


def test_the_twin_is_the_same_command_with_another_memory():
    from memformer.training.build import build_run
    from memformer.training.config import set_values
    from memformer.training.flags import read_config

    first, twin = (shlex.split(commands()[name].split("&& ")[-1]) for name in ("train", "twin"))
    (chosen,) = (word for word in twin if word.startswith("--config.model."))
    assert [word for word in twin if word != chosen] == first
    config = read_config(str(ROOT / dict(word.split("=", 1) for word in twin[2:])["--config"]))
    set_values(config, [chosen.removeprefix("--config.")])
    assert build_run(config.to_dict()).config["model"]["memory"] == "softmax_attention"


def test_every_file_named_is_there():
    text = README.read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:memformer|tests|benchmarks|configs)[\w/.]*)`", text)
    assert len(named) > 5
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    sys.path.insert(0, str(ROOT))
    write()
