"""Captions: pictures that determine their captions, held-out pairs, stamps split by picture, the vocabulary."""

import collections
import os

import numpy as np
import pytest

from memformer.data.shapes import COLOURS, HELD_OUT, KINDS, describe_scene, draw_scene, paint_scene
from memformer.data.source import SPLITS
from memformer.data.stamps import STAMPS_FOLDER, STAMPS_PACKAGE, clean_caption, list_stamps, split_stamps
from memformer.tasks import Captions, make_task
from memformer.tasks import captions as module

SHAPES = Captions()


def sentences(split: str, count: int) -> list[str]:
    source = SHAPES.source(split, 0)
    return [" ".join(SHAPES.decode(source[i]["targets"])) for i in range(count)]


def pairs(sentence: str) -> set[tuple[str, str]]:
    words = sentence.split()
    return {(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLOURS and b in KINDS}


def test_inputs_are_targets_one_step_later():
    one = SHAPES.source("train", 0)[0]
    used = int(one["loss_weights"].sum())
    assert one["inputs"][0] == module.START and one["targets"][used - 1] == module.END
    np.testing.assert_array_equal(one["inputs"][1:used], one["targets"][: used - 1])
    np.testing.assert_array_equal(one["segment_ids"] > 0, one["loss_weights"] > 0)
    assert not one["inputs"][used:].any() and not one["targets"][used:].any()


def test_pairs_of_the_test_split_are_in_no_other():
    found = {split: [pairs(s) for s in sentences(split, 400)] for split in SPLITS}
    for split in ("train", "validation"):
        assert not any(pairs & set(HELD_OUT) for pairs in found[split])
        assert len(set.union(*found[split])) == len(COLOURS) * len(KINDS) - len(HELD_OUT)
    assert all(pairs & set(HELD_OUT) for pairs in found["test"])
    assert set(HELD_OUT) <= set.union(*found["test"])
    # every colour and every kind is in training
    assert {colour for colour, _ in HELD_OUT} <= set(COLOURS) == {c for pairs in found["train"] for c, _ in pairs}
    assert {kind for pairs in found["train"] for _, kind in pairs} == set(KINDS)


def test_distribution_of_captions():
    counts = collections.Counter(
        next((word for word in ("above", "below", "left", "right") if word in sentence), "alone")
        for sentence in sentences("train", 800)
    )
    assert 0.19 < counts.pop("alone") / 800 < 0.31
    assert len(counts) == 4 and min(counts.values()) > 100


@pytest.mark.parametrize("held_out", [False, True])
def test_a_picture_determines_its_sentence(held_out):
    """The pixels alone determine the number of shapes, the larger one, and its position."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        relation, figures = draw_scene(rng, held_out=held_out)
        regions = [module.shapes.figure_coverage(figure, 64) > 0.5 for figure in figures]
        for figure in figures:
            assert figure.radius <= min(figure.x, figure.y) and max(figure.x, figure.y) <= 1 - figure.radius
        if not relation:
            assert len(figures) == 1 and describe_scene(relation, figures) == ("a", figures[0].colour, figures[0].kind)
            continue
        assert not (regions[0] & regions[1]).any()
        boxes = [np.argwhere(region) for region in regions]
        sides = [np.ptp(box, axis=0).max() for box in boxes]
        assert sides[0] > 1.25 * sides[1]
        rows, columns = boxes[1].mean(0) - boxes[0].mean(0)
        if abs(rows) > abs(columns):
            want = "above" if rows > 0 else "below"
        else:
            want = "left of" if columns > 0 else "right of"
        assert relation == want and " ".join(describe_scene(relation, figures)[3:-3]) == want


def test_regions_are_where_the_shapes_were_painted():
    for split in ("train", "test"):
        source = SHAPES.source(split, 7)
        for i in range(20):
            picture, regions = source[i]["picture"], SHAPES.regions(split, 7, i)
            assert regions.shape == (len(regions), 32, 32)
            covered = regions.max(0) > 0
            ground = picture[~covered]
            assert np.ptp(ground) == 0
            assert np.all(np.abs(picture[regions.max(0) == 1] - ground[0]).max(-1) > 0.2)


def test_paint_is_in_range():
    picture = paint_scene(np.random.default_rng(0), draw_scene(np.random.default_rng(1), held_out=False)[1], 16)
    assert picture.dtype == np.float32 and 0 <= picture.min() and picture.max() <= 1


def test_encoding_round_trip():
    words = ["a", "red", "circle", "left", "of", "a", "blue", "square"]
    assert SHAPES.decode(SHAPES.encode(words)) == words
    assert SHAPES.encode(["a", "zebra"])[1] == module.UNKNOWN
    assert SHAPES.decode([*SHAPES.encode(words[:3]), module.END, 7, 7]) == words[:3]
    assert len(set(SHAPES.words)) == SHAPES.vocab_size == SHAPES.num_classes


CLEANED = {
    "A koala.": "a koala",
    "Excited!": "excited",
    "Saturn—the second largest planet": "saturn the second largest planet",
    "A coin called a toonie. (Its name is a play.)": "a coin called a toonie",
    "“School Crossing”.": "school crossing",
    "Here’s an F-22 Raptor.": "here's an f-22 raptor",
    "Une règle de 30 cm": "une règle de 30 cm",
    "...": "",
}


@pytest.mark.parametrize("text", CLEANED)
def test_clean(text):
    assert " ".join(clean_caption(text)) == CLEANED[text]


@pytest.fixture(scope="module")
def stamps(tmp_path_factory) -> str:
    """Sixty generated stamps: a dot of one of three colours, left of the centre."""
    from PIL import Image

    root = tmp_path_factory.mktemp("stamps")
    for i in range(60):
        folder = root / f"kind{i % 4}"
        folder.mkdir(exist_ok=True)
        colour = ("red", "green", "blue")[i % 3]
        picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
        picture.paste(Image.new("RGBA", (20, 20), colour), (0, 0))
        picture.save(folder / f"dot{i}.png")
        rare = f" number{i}" if i % 5 == 0 else ""
        (folder / f"dot{i}.txt").write_text(f"A {colour} dot{rare}.\nde.utf8=Ein Punkt.\n", "utf-8")
        if i % 2:
            (folder / f"dot{i}.dat").write_text("scale=15%\nnomirror\n")
    (root / "kind0" / "silent.png").write_bytes((root / "kind0" / "dot0.png").read_bytes())
    (root / "kind0" / "alone.txt").write_text("No picture.")
    return str(root)


def test_stamps_are_split_by_picture(stamps):
    everything, parts = list_stamps(stamps), split_stamps(stamps)
    assert len(everything) == 60
    assert sum((parts[split] for split in SPLITS), ()) != everything
    assert sorted(stamp for split in SPLITS for stamp in parts[split]) == sorted(everything)
    assert len(parts["train"]) > 36 and all(parts.values())
    assert {stamp.mirrors for stamp in everything} == {True, False}


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_few_stamps_have_all_splits_where_they_can(tmp_path, count):
    from PIL import Image

    for i in range(count):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("A red square.\n")
    task = Captions(pictures="stamps", folder=str(tmp_path), size=16)
    if count >= 3:
        task.check_data()
        assert all(len(task.source(split, 0)) for split in SPLITS)
    else:
        with pytest.raises(ValueError, match="split of task 'captions' has no example"):
            task.check_data()


def test_stamp_words_are_those_of_several_training_captions(stamps):
    task = Captions(pictures="stamps", folder=stamps)
    assert task.words[4:] == ("a", "blue", "dot", "green", "red")
    assert task == Captions(pictures="stamps", folder=stamps)
    split = "test"
    source = task.source(split, 0)
    rare = next(i for i in range(len(source)) if len(task.reference(split, 0, i)) == 4)
    assert task.decode(source[rare]["targets"])[-1] == "<unknown>"
    assert source[rare]["loss_weights"][:6].tolist() == [1, 1, 1, 0, 1, 0]
    assert task.reference(split, 0, rare)[-1].startswith("number")


def test_stamps_have_a_white_background(stamps):
    task = Captions(pictures="stamps", folder=stamps, size=16)
    source = task.source("validation", 0)
    for i in range(len(source)):
        picture = source[i]["picture"]
        assert picture.shape == (16, 16, 3) and picture.dtype == np.float32
        # A 40 x 20 picture fills the width: white above and below, and the dot in the left half of the middle rows.
        np.testing.assert_array_equal(picture[:3], 1)
        np.testing.assert_array_equal(picture[6:10, 12:], 1)
        assert np.all(picture[6:10, :6].min(-1) == 0)


def test_training_stamps_move_and_mirror_only_where_they_may(stamps):
    task = Captions(pictures="stamps", folder=stamps, size=16)
    source = task.source("train", 3)
    assert source.endless and not task.source("test", 3).endless
    drawn = [source[i]["picture"] for i in range(60)]
    assert len({picture.tobytes() for picture in drawn}) > 40
    sides = [picture[:, :8].min(-1).sum() < picture[:, 8:].min(-1).sum() for picture in drawn]
    assert 0.55 < np.mean(sides) < 0.95
    fixed = module._vary(np.random.default_rng(1), np.zeros((16, 16, 3), np.uint8), False)
    assert fixed.shape == (16, 16, 3)


def test_a_caption_that_is_too_long_is_cut(stamps):
    task = Captions(pictures="stamps", folder=stamps, length=3)
    one = task.source("test", 0)[0]
    assert task.decode(one["targets"])[::2] == ["a", "dot"] and module.END not in one["targets"]
    assert one["loss_weights"].all() and one["inputs"][0] == module.START


def test_without_the_package(tmp_path):
    for folder, state in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "has no PNG with a caption")):
        task = Captions(pictures="stamps", folder=str(folder))
        for ask in (lambda task: task.source("train", 0), lambda task: task.vocab_size):
            with pytest.raises(ValueError, match=f"{state}.*apt-get install {STAMPS_PACKAGE}.*pictures='shapes' needs"):
                ask(task)


def test_a_caption_that_cannot_be_read(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    (tmp_path / "one.txt").write_bytes(b"A caf\xe9.\n")
    with pytest.raises(ValueError, match="one.txt cannot be read: .*utf-8"):
        list_stamps(str(tmp_path))


def test_a_picture_that_cannot_be_read(tmp_path):
    for i in range(20):
        (tmp_path / f"bad{i}.png").write_bytes(b"no picture")
        (tmp_path / f"bad{i}.txt").write_text("Bad.")
    with pytest.raises(ValueError, match="bad.*png cannot be read"):
        Captions(pictures="stamps", folder=str(tmp_path)).source("train", 0)


MISUSE = [
    ({"pictures": "photos"}, "pictures must be one of 'shapes', 'stamps', got 'photos'"),
    ({"length": 8}, "length must be an integer of at least 9, got 8"),
    ({"size": 8}, "size must be an integer of at least 16, got 8"),
    ({"folder": "x"}, "folder must be '' for pictures='shapes'"),
    ({"pictures": "stamps", "folder": None}, "folder must be a string, got None"),
]


@pytest.mark.parametrize("settings, message", MISUSE)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "captions", **settings})


def test_stamps_have_no_regions(stamps):
    task = Captions(pictures="stamps", folder=stamps)
    with pytest.raises(ValueError, match="pictures must be 'shapes' for regions"):
        task.regions("test", 0, 0)
    with pytest.raises(ValueError, match="split must be 'validation' or 'test' for stamps"):
        task.reference("train", 0, 0)


@pytest.mark.skipif(not os.path.isdir(STAMPS_FOLDER), reason=f"needs the package {STAMPS_PACKAGE}")
def test_the_installed_package():
    stamps = list_stamps(STAMPS_FOLDER)
    assert len(stamps) > 700
    words = collections.Counter(word for stamp in stamps for word in stamp.words)
    assert words["a"] > 400 and words["letter"] > 100
    task = Captions(pictures="stamps")
    assert 200 < task.vocab_size < 300 and list(task.words[4:]) == sorted(task.words[4:])
