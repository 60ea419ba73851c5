"""The studies that train their own models: the quick version of each, and what it must show."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.core.similarity import Kernel
from memformer.lab.__main__ import main
from memformer.lab.capacity_trained import MEMORIES
from memformer.lab.kernels import nearly_orthogonal, swap_by_hand
from memformer.lab.swap import spikes
from memformer.layers import build_memory

NAMES = ("swap", "curriculum", "kernels", "mqar", "reachability", "words", "hierarchy", "capacity_trained")
NAMES += ("ffn", "snr_trained")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_device, programs_kept, no_curves):
    """The JSON of each measurement's quick version, by name: the command's, with JAX's own defaults."""
    folder = tmp_path_factory.mktemp("lab")
    with one_device(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name in NAMES:
                patch.setattr(sys, "argv", ["lab", name, "--quick", "--out", "results"])
                main()
    return {name: json.loads((folder / "results" / f"{name}.json").read_text()) for name in NAMES}


# called "name", each would be a group of its own (conftest), measured anew in every worker
@pytest.mark.parametrize("lab", NAMES)
def test_it_writes_tables_and_no_verdict(measured, lab):
    study = measured[lab]
    assert study["name"] == lab and study["verdict"] is None and study["tables"][0]["rows"]
    assert (study["tables"][-1]["title"] == "Training") == (lab != "kernels")


def test_linear_writes_follow_swaps_and_softmax_does_not(measured):
    study = measured["swap"]
    assert study["values"]["kernel linear"]["8"] > 0.95
    assert study["values"]["kernel softmax"]["8"] < 0.8
    errors = study["tables"][1]["rows"]
    assert [row["run"] for row in errors] == ["kernel linear", "kernel softmax"]
    assert all(0 < float(row["16 swaps"]) < 1e-3 for row in errors)


def test_a_curriculum_comes_to_its_end(measured):
    study = measured["curriculum"]
    rows = {row["run"]: row for row in study["tables"][0]["rows"]}
    assert rows["plain by curriculum"]["longest trained"] == 16 and study["values"]["plain by curriculum"]["16"] > 0.9


def test_recall_is_learnt_through_softmax(measured):
    assert measured["mqar"]["values"]["softmax"] > 0.3


def test_pairs_are_recalled_after_training_at_equal_bytes(measured):
    rows = measured["capacity_trained"]["tables"][0]["rows"]
    assert [row["4096 bytes"].partition(" ")[2] for row in rows] == ["(K = 32)"]
    assert measured["capacity_trained"]["values"]["delta rule 4096"] > 1.5


@pytest.mark.parametrize("name", MEMORIES)
def test_equal_bytes_are_those_of_the_state(name):
    """All numbers of the state but what says which slots of a cache are in use."""
    contender = MEMORIES[name]
    sizes = {"heads": 1, "key_width": 3, "value_width": 3, "options": contender.options}
    layer = nnx.eval_shape(lambda: build_memory(contender.memory, 8, **sizes, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: layer.init_state(1, 5)["memory"])
    assert contender.numbers(3, 5) == sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 2)


def test_two_reflections_a_letter_follow_s3(measured):
    """Softmax attention has 0.38 after as many steps."""
    study = measured["words"]
    assert study["values"]["S3 product2"]["8"] > 0.47
    assert [(row["group"], row["model"]) for row in study["tables"][0]["rows"]] == [("S3", "DeltaProduct, n_h = 2")]


def test_rounding_to_integers_follows_more_objects_than_the_key_is_wide(measured):
    values = measured["kernels"]["values"]
    assert values["192 round to integers"] == 1.0
    assert values["192 linear"] < 0.75


def test_reachability_is_learnt_by_one_layer(measured):
    assert measured["reachability"]["values"]["DeltaFormer, 1 layer"]["8"] > 0.75


def test_parity_is_learnt_by_deltaformer(measured):
    """At twice the length of training; a transformer has 0.54 there after as many steps."""
    study = measured["hierarchy"]
    assert study["values"]["parity DeltaFormer"]["12"] > 0.9
    assert study["tables"][0]["rows"][0]["paper"] == "100.0%"


def test_the_largest_pairs_of_a_feedforward_layer_matter_most(measured):
    (layer,) = measured["ffn"]["tables"][0]["rows"]
    assert abs(layer["Gaussian keys"] / layer["theory 1/SNR"] - 1) < 0.4
    for row in measured["ffn"]["tables"][1]["rows"]:
        assert row["change, largest"] > 2 * row["change, random"]
        assert row["without the largest"] > row["bits per byte, all pairs"]


def test_heads_that_are_hardly_trained_do_not_recall(measured):
    study = measured["snr_trained"]
    rows = study["tables"][0]["rows"]
    assert [row["head"] for row in rows] == [f"recall deltaformer {n}" for n in ("1.1", "1.2", "2.1", "2.2")]
    # nothing is recalled yet: the target pair is one among the others
    for medians in study["values"]["1/SNR"].values():
        assert 1 < medians["own query, trained"] < medians["target pair, trained"]


def test_orthogonal_keys_need_no_rounding():
    keys = np.eye(8, dtype=np.float32)
    for kernel in (Kernel("linear"), Kernel("round")):
        assert swap_by_hand(keys, keys, kernel, swaps=16, batch=2).min() == 1.0


def test_vectors_are_nearly_orthogonal():
    keys = nearly_orthogonal(400, 1)
    products = keys @ keys.T - np.eye(400, dtype=np.float32)
    assert keys.shape == (400, 128) and abs(np.abs(products).max() - 1 / 8) < 1e-5


@pytest.mark.parametrize(
    ("losses", "count"), [([1, 0.9, 0.8], 0), ([1, 2.1], 1), ([1, 3, 4, 1, 3], 2), ([], 0), ([2, 1, 1.9, 2.1], 1)]
)
def test_a_spike_is_an_excursion_above_twice_the_least(losses, count):
    assert spikes(losses) == count
