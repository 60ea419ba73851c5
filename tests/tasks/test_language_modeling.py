"""Language modelling on token stores: examples, mixtures, records of a run, what is refused."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest

from memformer.data.corpus import wrap_source
from memformer.data.source import SPLITS
from memformer.data.token_store import TokenStore
from memformer.data.tokenization import tokenize_corpus
from memformer.data.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from memformer.tasks import LanguageModeling
from memformer.training.config import default_config, task_of
from memformer.training.input import check_batch, check_split, make_loader
from memformer.training.losses import means

TEXTS = [f"document {i}: " + "ab" * (i % 9) for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    tokenize_corpus(wrap_source(TEXTS), folder / "a")
    tokenize_corpus(wrap_source([text[::-1] for text in TEXTS[:120]]), folder / "b")
    return folder


def examples(loader, count: int) -> list[bytes]:
    return [row.tobytes() for _ in range(count) for row in next(loader)["targets"]]


@pytest.mark.parametrize("packing", ["windows", "best_fit"])
def test_batches(folder, packing):
    task = LanguageModeling(length=32, path=str(folder / "a"), packing=packing)
    task.check_data()
    assert (task.vocab_size, task.num_classes, task.chance, task.steps) == (257, 257, None, 32)
    for split in SPLITS:
        check_split(task, split, 0)
        source = task.source(split, 0)
        for i in range(len(source)):
            check_batch({name: array[None] for name, array in source[i].items()}, task, 1)
        scored = sum(source[i]["loss_weights"].sum() for i in range(len(source)))
        assert scored == TokenStore(folder / "a").split(split).count("scored")
        # a uniform model takes the logarithm of the vocabulary per token, and the end of text counts no byte
        uniform = {"loss": scored * np.log(257), "weight": scored}
        size = TokenStore(folder / "a").split(split).count("bytes")
        bits = means(uniform, task.scores, task.bytes_per_step(split))
        assert bits["bits_per_byte"] == pytest.approx(scored * np.log2(257) / size)
        assert bits["perplexity"] == pytest.approx(257)


def test_the_order_is_a_function_of_seed_and_position(folder):
    options = {"batch_size": 8, "prefetch": 0}
    for task in (
        LanguageModeling(length=32, path=str(folder / "a")),
        LanguageModeling(length=32, path=f"{folder / 'a'}, {folder / 'b'}", weights=(3.0, 1.0)),
    ):
        whole = examples(make_loader(task, "train", seed=5, **options), 30)
        # resumed in the middle of an epoch
        assert examples(make_loader(task, "train", seed=5, position=72, **options), 21) == whole[72:]
        # on two hosts
        hosts = [make_loader(task, "train", seed=5, rows=rows, position=72, **options) for rows in ((0, 3, 5), (7,))]
        for at in (72, 80, 88):
            read = [row.tobytes() for loader in hosts for row in next(loader)["targets"]]
            assert read == [whole[at + row] for row in (0, 3, 5, 7)]
        assert examples(make_loader(task, "train", seed=6, **options), 30) != whole


def test_sources_travel_to_other_processes(folder):
    task = LanguageModeling(length=32, path=f"{folder / 'a'},{folder / 'b'}")
    source = task.source("train", 3)
    first = source[5]
    copy = pickle.loads(pickle.dumps(source))
    assert all(np.array_equal(copy[5][name], first[name]) for name in first)


def test_epochs(folder):
    task = LanguageModeling(length=32, path=str(folder / "a"))
    size = len(task.source("train", 0))
    loader = make_loader(task, "train", seed=0, batch_size=4, prefetch=0)
    assert loader.epochs == (0.0,)
    first, second = examples(loader, size), examples(loader, size)
    assert loader.epochs == (pytest.approx(8.0),)
    assert sorted(first[:size]) == sorted(second[:size]) and first[:size] != second[:size]
    mixed = LanguageModeling(length=32, path=f"{folder / 'a'},{folder / 'b'}", weights=(1.0, 1.0))
    loader = make_loader(mixed, "train", seed=0, batch_size=4, position=4 * size, prefetch=0)
    assert loader.epochs == pytest.approx((2.0, 2 * size / len(mixed.source("train", 0)._sources[1])))


def test_held_out_examples_of_mixtures_do_not_depend_on_the_seed(folder):
    mixed = LanguageModeling(length=32, path=f"{folder / 'a'},{folder / 'b'}")
    loaders = [make_loader(mixed, "validation", seed=seed, batch_size=4, prefetch=0) for seed in (0, 1)]
    assert examples(loaders[0], 3) == examples(loaders[1], 3)
    ratio = mixed.bytes_per_step("validation")
    apart = [LanguageModeling(path=str(folder / name)).bytes_per_step("validation") for name in "ab"]
    assert ratio == pytest.approx(sum(apart) / 2)


def test_a_run_records_the_store_and_works_without_it(folder, tmp_path):
    task = LanguageModeling(length=32, path=str(folder / "a"))
    recorded = dataclasses.replace(task, **task.resolved)
    assert recorded.resolved == {} and recorded.vocab == 257
    assert recorded.fingerprint == f"bytes/{TokenStore(folder / 'a').fingerprint}"
    elsewhere = dataclasses.replace(recorded, path=str(tmp_path / "gone"))
    assert elsewhere.vocab_size == 257 and elsewhere.resolved == {}
    with pytest.raises(ValueError, match="there is no token store"):
        elsewhere.source("train", 0)
    # another corpus by the same tokenizer can be scored
    assert len(dataclasses.replace(recorded, path=str(folder / "b")).source("test", 0))
    task.write_files(str(tmp_path))
    assert isinstance(load_tokenizer(str(tmp_path / "tokenizer")), ByteTokenizer)
    # a dry run needs the vocabulary alone, and ids may be left unused
    assert LanguageModeling(vocab=32000).resolved == {}
    assert LanguageModeling(path=str(folder / "a"), vocab=384).resolved["vocab"] == 384
    with pytest.raises(ValueError, match="data.vocab must be an integer of at least 257, got 256"):
        LanguageModeling(path=str(folder / "a"), vocab=256).check_data()


def test_other_tokenizers_are_refused(folder, tmp_path):
    pytest.importorskip("tokenizers")
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=280)
    tokenize_corpus(wrap_source(TEXTS), tmp_path / "c", tokenizer=str(tmp_path / "tokenizer"))
    task = LanguageModeling(path=f"{folder / 'a'},{tmp_path / 'c'}")
    with pytest.raises(ValueError, match=r"tokens of .*c were made by another tokenizer \(sha256:.* than those of .*a"):
        task.check_data()
    recorded = dataclasses.replace(
        LanguageModeling(path=str(folder / "a")), fingerprint="bytes/x", path=str(tmp_path / "c")
    )
    with pytest.raises(ValueError, match="than those of the run"):
        recorded.check_data()
    assert LanguageModeling(path=str(tmp_path / "c")).bytes_per_step("train") > 1.2


def test_a_store_without_a_split_is_told_at_the_start(tmp_path):
    tokenize_corpus(wrap_source(TEXTS), tmp_path, test=0)
    with pytest.raises(ValueError, match="has no test documents, and a run scores all splits"):
        LanguageModeling(path=str(tmp_path)).check_data()


def test_splits_shorter_than_an_example_are_logged(folder, caplog):
    LanguageModeling(length=10_000, path=str(folder / "a")).check_data()
    assert "the test split has" in caplog.text


BAD = {
    "length": (0, "length must be an integer of at least 1"),
    "path": (3, "path must be a string, got 3"),
    "packing": ("first", "packing must be one of 'windows', 'best_fit', got 'first'"),
    "weights": ((1.0, 0.0), "weights must be a finite number above 0"),
    "vocab": (-1, "vocab must be an integer of at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_out_of_range(name):
    value, problem = BAD[name]
    with pytest.raises(ValueError, match=problem):
        LanguageModeling(**{name: value})


def test_paths_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="data.path must name a token store; write one with: python -m memformer.data"):
        LanguageModeling().check_data()
    with pytest.raises(ValueError, match=r"data.weights must be one number per store, 1, got \(1.0, 2.0\)"):
        LanguageModeling(path=str(folder / "a"), weights=(1.0, 2.0)).check_data()


def test_a_store_that_is_written_again_is_read_again(tmp_path):
    task = LanguageModeling(length=16, path=str(tmp_path / "store"))
    tokenize_corpus(wrap_source(TEXTS[:60]), tmp_path / "store")
    before = len(task.source("train", 0))
    shutil.rmtree(tmp_path / "store")
    tokenize_corpus(wrap_source(TEXTS), tmp_path / "store")
    assert len(task.source("train", 0)) > before


def test_a_folder_with_a_comma(tmp_path):
    tokenize_corpus(wrap_source(TEXTS), tmp_path / "a,b")
    LanguageModeling(path=str(tmp_path / "a,b")).check_data()


def test_options_of_the_data_have_their_own_section():
    config = default_config(task="lm")
    assert set(config.task) == {"name", "length"} and config.data.packing == "windows"
    config.data.packing = "best_fit"
    assert task_of(config.to_dict()).packing == "best_fit"
    assert default_config(task="swap").data.to_dict() == {}
