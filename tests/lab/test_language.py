"""The study of language models: two small ones from chapters to the figure."""

import dataclasses
import functools
import json
import pathlib

import pytest

from memformer.data import TokenStore
from memformer.lab import language
from memformer.lab.language import LANGUAGE, ROWS
from memformer.lab.repeats import ATTENTION, REPEATS
from memformer.lab.runner import run_study
from memformer.lab.runs import make_config
from memformer.lab.study import Result, Table
from memformer.models import build_model
from memformer.training import loop
from memformer.training.build import model_settings
from memformer.training.config import RunError
from memformer.training.evaluation import load_run
from memformer.training.step import make_functional
from tests.lab.test_trained import count_steps, half_right


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_device, programs_kept, no_curves):
    """The quick version: (folder, result). The steps that are timed are those of training; those of the LSTM count."""
    folder, make, init = tmp_path_factory.mktemp("language"), loop.make_train_step, loop.init_state
    quick = dataclasses.replace(LANGUAGE.quick, settings={**LANGUAGE.quick.settings, "sampled": 1})

    def make_step(model, *parts, **options):
        softmax = any("query" in str(name) for name, _ in model.params.items())
        return (make if softmax else count_steps)(model, *parts, **options)

    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "init_state", init)
        for module in (language, loop):
            patch.setattr(module, "make_train_step", make_step)
        # the measured loss is that by position
        patch.setattr(loop, "make_eval_step", lambda *_: half_right)
        patch.chdir(folder)
        return folder, run_study(
            dataclasses.replace(LANGUAGE, quick=quick), out="results", quick=True, runs_folder="runs"
        )


def test_all_models_are_measured_on_the_same_tokens(measured):
    folder, result = measured
    models, contexts, samples, trained = result.tables
    assert [row["model"] for row in models.rows] == ["softmax attention", "LSTM"]
    for row in models.rows:
        # 257 ids and little training: about the entropy of a uniform byte
        assert 4 < row["bits per byte"] < 10 and row["training tokens per CPU second"] > 0
    softmax, lstm = models.rows
    grows = [int(softmax[f"state bytes at {n} tokens"].replace(",", "")) for n in (256, 4096)]
    assert grows[1] > 10 * grows[0]
    assert lstm["state bytes at 256 tokens"] == lstm["state bytes at 4096 tokens"]
    assert list(contexts.rows[0]) == ["model", "1", "2", "4", "8", "16"]
    assert all(row["text"].startswith("In the beginning") for row in samples.rows)
    assert [row["steps"] for row in trained.rows] == [4, 4] and result.values["training tokens"] == 4 * 4 * 16
    store = TokenStore(folder / "runs" / "language-quick-data" / "tokens")
    assert sum(store.split(split).count("documents") for split in ("train", "validation", "test")) == 514
    content = json.loads((folder / "results" / "language.json").read_text())
    assert content["verdict"] is None and (folder / "results" / "language.png").stat().st_size > 1000


def test_repeated_tokens_are_measured(measured, one_device, monkeypatch):
    """The study of repeated tokens, on the attention model trained above as its model of comparison and as another."""
    monkeypatch.chdir(measured[0])
    with one_device():
        run = load_run("runs/language-quick/softmax_attention")
        result = REPEATS.measure({ATTENTION: run, "other": run}, {**REPEATS.settings, **REPEATS.quick.settings})
    models, distances, rare, heads, contexts = result.tables
    assert all(row["lag, near"] == row["lag, far"] == 0 and 4 < row["bits per byte"] < 10 for row in models.rows)
    counted = distances.rows[-1]
    assert list(counted)[:3] == ["model", "none", "1"] and sum(list(counted.values())[1:]) == 2 * 4 * 16
    scored = sum(count * distances.rows[0][name] for name, count in counted.items() if name != "model")
    assert models.rows[0]["loss per token"] == pytest.approx(scored / 128, abs=1e-3)
    near = next(name for name in rare.rows[0] if name.startswith("1 to 15"))
    assert all(3 < row[near] < 10 for row in rare.rows) and list(contexts.rows[0])[-1] == "16"
    assert heads.rows[0]["questions"] > 1 and heads.rows[0]["heads below 1"].endswith(" of 1")
    assert REPEATS.draw(result).axes


def test_the_models_have_about_the_same_size():
    for label, row in [*ROWS.items(), *REPEATS.rows.items()]:
        settings = model_settings(make_config(LANGUAGE.base, row).to_dict()["model"])
        # equal layers: the parameters of one count for all
        equal = "," not in row["model.memory"]
        depth = settings["depth"] if equal else 1
        params = make_functional(functools.partial(_build, {**settings, "depth": 1} if equal else settings)).params
        size = sum(x.size * (depth if name.startswith("blocks.") else 1) for name, x in params.items())
        assert 10.4e6 < size < 10.6e6, label


def _build(settings, rngs):
    return build_model(settings, vocab_size=4096, num_classes=4096, features=0, rngs=rngs)


def test_the_page_has_the_measured_numbers():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    page = (docs / "language.md").read_text(encoding="utf-8")
    models, contexts, samples, _ = json.loads((docs / "results" / "language.json").read_text())["tables"]
    for row in [*models["rows"], *contexts["rows"]]:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        assert f"| {' | '.join(cells)} |" in page
    assert all(f"- **{row['model']}**: {row['text']}" in page for row in samples["rows"])


def test_the_verdict():
    def judged(softmax, gated, hybrid):
        found = {"softmax attention": softmax, "gated delta rule": gated, "hybrid 3 to 1": hybrid}
        rows = [{"model": name, "bits per byte": value} for name, value in found.items()]
        return LANGUAGE.judge(Result([Table("Test split", rows)]))

    assert judged(1.9, 1.8, 1.7).kind == "confirmed"
    assert judged(1.9, 1.8, 1.85).kind == "partly confirmed"
    assert judged(1.8, 1.9, 1.85).kind == "refuted"
    assert "hybrid 3 to 1 1.700" in judged(1.9, 1.8, 1.7).finding


def test_a_missing_corpus_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("memformer.lab.language.find_chapters", lambda: None)
    with pytest.raises(RunError, match="apt-get install sword-text-web"):
        LANGUAGE.prepare(str(tmp_path), LANGUAGE.settings)
