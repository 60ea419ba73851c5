"""The road of the README, from a folder of text to a model that writes: its commands run on a small corpus."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest

from memformer.data import load_tokenizer
from memformer.data.__main__ import main
from memformer.data.token_store import TokenStore
from memformer.training.config import set_values
from memformer.training.evaluation import evaluate_checkpoint
from memformer.training.flags import read_config
from memformer.training.generation import show_text
from memformer.training.loop import train
from memformer.training.metrics import read_records

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")
ROOT = pathlib.Path(__file__).parents[1]
ROAD = "python -m memformer.data train_tokenizer"
SMALL = [
    "task.length=32", "model.memory=softmax_attention", "model.width=16", "model.depth=1", "model.heads=1",
    "model.feedforward=None",
    "optimizer.warmup_steps=2", "train.steps=6", "train.batch_size=8", "train.accumulate=1", "train.log_every=2",
    "train.eval_every=0", "train.eval_batches=1", "train.final_batches=1", "train.progress=False",
]  # fmt: skip


def road(page: str) -> str:
    """The block of commands on a page that begins with training a tokenizer."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(ROAD))
    return block


def commands(folder: pathlib.Path) -> list[list[str]]:
    """The commands of the README, with their files in `folder`."""
    block = road("README.md")
    block = block.replace(" books/ ", f" {folder}/books/ ").replace("=runs/", f"={folder}/runs/")
    return [shlex.split(line) for line in block.splitlines()]


def options(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))


def test_the_page_of_data_has_the_same_commands():
    assert road("README.md") == road("docs/data.md")


def test_the_road(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "books").mkdir()
    rng = np.random.default_rng(0)
    words = ["sea", "ship", "whale", "captain", "storm", "harbour"]
    for i in range(60):
        (tmp_path / "books" / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)) + f" {i}\n")
    (tmp_path / "books" / "broken.txt").write_bytes(b"\xff")
    found = commands(tmp_path)
    assert [command[1:3] for command in found[:2]] == [["-m", "memformer.data"]] * 2
    assert [command[1] for command in found[2:]] == ["train.py", "eval.py", "generate.py"]
    for command in found[:2]:
        small = ["--processes=1"] if "tokenize" in command else []
        assert main([*command[3:], *small]) == 0
    shown = capsys.readouterr().out
    assert "broken.txt:1: byte 0xff is no UTF-8" in shown and "left out: 1 document or file, broken UTF-8" in shown

    chosen = options(found[2])
    config = read_config(str(ROOT / chosen["config"]))
    given = [f"{name.removeprefix('config.')}={value}" for name, value in chosen.items() if name.startswith("config.")]
    set_values(config, [*given, *SMALL])
    workdir = chosen["workdir"]
    result = train(config, workdir)
    assert result["finished"] and result["steps"] == 6
    store = TokenStore(config.data.path)
    assert load_tokenizer(f"{workdir}/tokenizer").fingerprint == store.tokenizer().fingerprint
    saved = json.loads(pathlib.Path(workdir, "config.json").read_text())["data"]
    assert saved["vocab"] == store.vocab_size and saved["fingerprint"].endswith(store.fingerprint)
    records = [record for record in read_records(f"{workdir}/metrics.jsonl") if record["kind"] == "train"]
    windows = -(-store.split("train").count("tokens") // 32)
    assert [record["epoch"] for record in records] == pytest.approx([8 * step / windows for step in (2, 4, 6)])
    assert all(0.9 < record["packing_efficiency"] <= 1 for record in records)
    part = store.split("train")
    assert records[0]["bits_per_byte"] == pytest.approx(
        records[0]["loss"] / np.log(2) * part.count("scored") / part.count("bytes")
    )

    chosen = options(found[4])
    assert chosen.pop("workdir") == workdir and set(chosen) == {"prompt", "max_new_tokens"}
    capsys.readouterr()
    show_text([chosen["prompt"]], workdir=workdir, max_new_tokens=8)
    assert chosen["prompt"] in capsys.readouterr().out

    # the store may have moved
    moved = pathlib.Path(config.data.path).rename(tmp_path / "moved")
    scores = evaluate_checkpoint(workdir, batches=1, settings=[f"data.path={moved}"])
    assert scores["lengths"]["32"] == pytest.approx(result["lengths"]["32"])
