"""Translation: examples, splits, SWORD modules, the choice of corpus, errors."""

import logging
import struct
import zlib

import numpy as np
import pytest

from memformer.data.source import SPLITS
from memformer.data.verses import (
    CHAPTERS,
    MODULES,
    Verse,
    find_chapters,
    find_verses,
    read_chapters,
    read_verse_slice,
    read_verses,
    strip_markup,
)
from memformer.tasks import translation
from memformer.tasks.translation import END, PADDING, SPECIAL, START, Translation
from memformer.training.build import build_run
from memformer.training.config import RunError, default_config

TASK = Translation(corpus="slice", vocab_size=800, length=64)


def write_modules(folder, verses):
    """SWORD modules with one book per testament; (english, spanish) with their markup."""
    for language, module in enumerate(MODULES):
        write_module(folder / module, [[pair[language] for pair in testament] for testament in verses])
    return str(folder)


def write_module(folder, testaments):
    """A SWORD module with one book per testament."""
    folder.mkdir(parents=True)
    for testament, verses in zip(("ot", "nt"), testaments, strict=True):
        texts = [verse.encode() for verse in verses]
        book = b"".join(texts)
        packed = zlib.compress(book)
        starts = np.cumsum([0, *map(len, texts)])
        rows = [struct.pack("<IIH", 0, start, len(t)) for start, t in zip(starts, texts, strict=False)]
        path = folder / testament
        path.with_suffix(".bzz").write_bytes(b"..." + packed)
        path.with_suffix(".bzs").write_bytes(struct.pack("<III", 3, len(packed), len(book)))
        path.with_suffix(".bzv").write_bytes(b"".join(rows))


@pytest.fixture
def modules(tmp_path):
    many = [(f"verse <w>{i}</w>", f"versículo {i}") for i in range(60)]
    old = [('<chapter sID="1"/>', ""), ("In <note>a</note>the", "EN el"), ("only English", "<title>t</title>")]
    return write_modules(tmp_path, [old, many])


def test_an_example_is_the_verse_in_both_languages():
    for split in SPLITS:
        source = TASK.source(split, 0)
        assert len(source) == len(TASK.pairs(split))
        for i, (verse, english, spanish) in list(enumerate(TASK.pairs(split)))[:20]:
            one = source[i]
            steps = len(spanish) + 1
            assert TASK.decode(one["source"]) == verse.english and TASK.decode(one["targets"]) == verse.spanish
            assert one["inputs"][0] == START and one["targets"][steps - 1] == END
            np.testing.assert_array_equal(one["inputs"][1:steps], one["targets"][: steps - 1])
            assert one["source"][len(english)] == END and one["source_segment_ids"].sum() == len(english) + 1
            np.testing.assert_array_equal(one["loss_weights"], np.arange(64) < steps)
            np.testing.assert_array_equal(one["segment_ids"], np.arange(64) < steps)
            assert not np.any(one["source"][len(english) + 1 :]) and not np.any(one["inputs"][steps:])


def test_splits_share_no_source_and_contain_every_verse():
    long = TASK.with_length(400)
    english = {split: {pair.verse.english for pair in long.pairs(split)} for split in SPLITS}
    assert not english["train"] & english["test"] and not english["train"] & english["validation"]
    assert not english["test"] & english["validation"]
    assert sum(len(long.pairs(split)) for split in SPLITS) == len(read_verse_slice()) == 514


def test_the_vocabulary_does_not_depend_on_the_length_and_serves_all():
    assert TASK.with_length(20).byte_pairs is TASK.byte_pairs
    assert TASK.byte_pairs.size == TASK.vocab_size - SPECIAL
    assert all(pair.length <= 20 for pair in TASK.with_length(20).pairs("train"))
    text = "Y dijo Dios: Sea la luz ¿ñ?"
    assert TASK.decode(TASK.encode(text)) == text


def test_decode_stops_at_the_end_and_skips_unused_ids():
    ids = TASK.encode("luz")
    assert TASK.decode([START, *ids, END, *ids]) == "luz"
    assert TASK.decode([*ids, PADDING, *ids]) == "luz"
    # The slice yields fewer merges than this vocabulary has ids.
    wide = Translation(corpus="slice", vocab_size=20000)
    assert wide.byte_pairs.size < 20000 - SPECIAL and wide.decode([19999]) == ""


@pytest.mark.parametrize(
    "text, want",
    [
        ("<w a='b'>In</w>  the\nbeginning ", "In the beginning"),
        ("x<note type='n'>no <b>n</b></note>y<title>\nno</title>z", "xyz"),
        ("<note/>a<title t='1'/>b<note>c</note>", "ab"),
    ],
)
def test_markup_is_stripped(text, want):
    assert strip_markup(text) == want


def test_modules_are_read(modules):
    verses = read_verses(modules)
    assert verses[0] == Verse("In the", "EN el") and verses[1] == Verse("verse 0", "versículo 0") and len(verses) == 61
    task = Translation(folder=modules, vocab_size=300)
    assert "61 verses of sword-text-kjv" in task.origin
    assert sum(len(task.source(split, 0)) for split in SPLITS) == 61


def test_modules_are_found_in_the_usual_folders(modules, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SWORD_PATH", modules)
    assert find_verses() == modules
    monkeypatch.delenv("SWORD_PATH")
    shared = tmp_path_factory.mktemp("share")
    write_modules(shared / "sword", [[("a", "b")], [("c", "d")]])
    monkeypatch.setenv("XDG_DATA_DIRS", f"/nowhere:{shared}")
    assert find_verses() == str(shared / "sword")


def test_chapters_are_read(tmp_path):
    def begin(name):
        chapter = f'<div sID="gen2" type="x-p"/><chapter n="1" osisID="{name}.1" sID="{name}.1"/>'
        return [f'<div canonical="true" osisID="{name}" sID="gen1" type="book"/><title>{name}</title> Preface', chapter]

    old = ["", *begin("Gen"), "In the <w>beginning</w>,<note>or: at</note> God", "light<note/>. Yes"]
    old += ['the end<chapter n="2" osisID="Gen.2" sID="Gen.2"/>', "<w>heavens</w><note>n</note><w>finished</w>"]
    # a text that is in the module twice, and the end tag of a book
    new = [*begin("EsthGr"), "twice", *begin("Matt"), '<l>Abraham</l> <div eID="gen1" type="book"/>']
    write_module(tmp_path / CHAPTERS, [old, new])
    assert find_chapters(str(tmp_path)) == str(tmp_path) and find_chapters(str(tmp_path / "no")) is None
    found = read_chapters(str(tmp_path))
    assert found == ("In the beginning, God\nlight. Yes\nthe end", "heavens finished", "Abraham")
    (tmp_path / CHAPTERS / "nt.bzz").write_bytes(b"")
    with pytest.raises(ValueError, match="install the package sword-text-web again"):
        read_chapters(str(tmp_path))


def test_without_modules_the_slice_is_used_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(translation, "find_verses", lambda folder: None)
    translation._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        task = Translation(vocab_size=800)
        assert task.origin == "514 verses of Genesis 1 to 20, included in the package"
    assert "apt-get install sword-text-kjv sword-text-sparv" in caplog.text
    with pytest.raises(ValueError, match=r"has no verses: install them \(apt-get install sword-text-kjv"):
        Translation(corpus="installed").source("train", 0)


def test_a_run_records_its_corpus(modules, monkeypatch):
    """On a machine without the verses the run fails, instead of using the weights with another vocabulary."""
    config = default_config("seq2seq").to_dict()
    config["task"] = {"name": "translation", "length": 8, "vocab_size": 300, "corpus": "auto"}
    with monkeypatch.context() as here:
        here.setenv("SWORD_PATH", modules)
        kept = build_run(config).config
    assert kept["task"] == {"name": "translation", "length": 8, "vocab_size": 300, "corpus": "installed", "folder": ""}
    monkeypatch.setattr(translation, "find_verses", lambda folder: None)
    assert build_run(config).config["task"]["corpus"] == "slice"
    with pytest.raises(RunError, match="has no verses: install them"):
        build_run(kept)


def test_damaged_modules_are_named(modules, tmp_path):
    path = tmp_path / MODULES[0] / "ot.bzz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="the verses cannot be read .* install the packages"):
        read_verses(modules)


MISTAKES = {
    "corpus": ({"corpus": "web"}, "corpus must be one of 'auto', 'installed', 'slice', got 'web'"),
    "vocab_size": ({"vocab_size": 200}, "vocab_size must be an integer of at least 259"),
    "length": ({"length": 1}, "length must be an integer of at least 2"),
    "folder": ({"folder": 3}, "folder must be a string"),
    "both": ({"corpus": "slice", "folder": "/x"}, "folder must be '' for corpus='slice'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_options_are_named(name):
    fields, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        Translation(**fields)


def test_another_folder_without_verses_is_named(tmp_path):
    with pytest.raises(ValueError, match="task.folder .* has no verses"):
        Translation(folder=str(tmp_path)).source("train", 0)


def test_a_length_that_no_verse_fits_is_refused():
    task = Translation(corpus="slice", vocab_size=300, length=2)
    with pytest.raises(ValueError, match="the train split of task 'translation' has no example at task.length=2"):
        task.check_data()
