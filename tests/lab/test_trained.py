"""The studies that train their own models.

The command runs the quick version of each. Those of LEARNT train the models of their rows, and show what they must;
`snr_trained` measures its own model as it is at the start. In the others nothing depends on the model but what the
trainer reports of it: there a small one stands for it, and a step that learns nothing for the compiled one; the model
itself is traced in the step of training.
"""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.core.similarity import Kernel
from memformer.lab import STUDIES
from memformer.lab.__main__ import main
from memformer.lab.capacity_trained import MEMORIES
from memformer.lab.kernels import nearly_orthogonal, swap_by_hand
from memformer.lab.runs import COMMON, make_config
from memformer.lab.swap import spikes
from memformer.layers import build_memory
from memformer.training import build, loop
from memformer.training.build import build_run
from memformer.training.input import batch_arrays
from memformer.training.sharding import mesh_scope
from memformer.training.step import abstract_state, make_train_step
from tests.training.small import build_counting

LEARNT = ("swap", "kernels", "ffn", "snr_trained")
# `language` and `repeats` prepare a corpus, see their own tests
CORPUS = ("language", "repeats")
OTHERS = tuple(name for name, s in STUDIES.items() if s.rows and s.quick and name not in (*LEARNT, *CORPUS))
FEW = {"train.steps": 4, "train.log_every": 2, "train.batch_size": 8, "train.final_batches": 1}
# changes and settings that are smaller still than those of the quick version
SMALLER = {
    **dict.fromkeys(OTHERS, (FEW, {})),
    "snr_trained": ({"model.depth": 1, "train.steps": 2}, {}),
    "ffn": ({}, {"counts": (8,), "draws": 1}),
}


def half_right(params, rest, batch):
    """Replaces the step of evaluation: half of the positions are answered correctly."""
    weights = np.asarray(batch["loss_weights"], np.float32)
    half, rows = weights.sum() / 2, np.float32((weights > 0).any(axis=1).sum())
    answers = {"loss": half, "weight": 2 * half, "correct": half, "errors": half}
    return {**answers, "sequences": rows, "sequences_correct": np.float32(0)}


def count_steps(model, tx, schedule, mesh, options, ema=0.0):
    """Replaces `make_train_step`: the step counts, and the state stays as it is."""

    def step(state, batch):
        number, same = int(state["step"]) + 1, ("aux", "bad_count", "bad_step", "learning_rate")
        norms = dict.fromkeys(("gradient_norm", "parameter_norm", "update_norm"), np.float32(1))
        report = {**half_right(None, None, batch), **dict.fromkeys(same, np.float32(0)), **norms}
        report["tokens"] = np.float32(np.sum(np.asarray(batch["segment_ids"]) > 0))
        report["steps"] = np.float32((number - 1) % options["log_every"] + 1)
        return {**state, "step": jax.device_put(np.int32(number), state["step"].sharding)}, report

    return step


def zeros(model, tx, mesh, *, seed, ema=0.0):
    """Replaces `init_state`."""
    shapes = abstract_state(model, tx, mesh, ema)
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)


# from this study on
REPLACED = {
    "snr_trained": {"make_train_step": count_steps, "make_eval_step": lambda *_: half_right},
    OTHERS[0]: {"init_state": zeros},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_device, programs_kept, no_curves):
    """The JSON of each measurement's quick version, by name: the command's, with JAX's own defaults."""
    folder = tmp_path_factory.mktemp("lab")
    with one_device(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            # drawn, and written by test_study
            patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
            for name in LEARNT + OTHERS:
                if name == OTHERS[0]:
                    patch.setattr(build, "build_model", build_counting)
                for replaced, instead in REPLACED.get(name, {}).items():
                    patch.setattr(loop, replaced, instead)
                if name in SMALLER:
                    quick, (changes, settings) = STUDIES[name].quick, SMALLER[name]
                    smaller = dataclasses.replace(
                        quick, changes={**quick.changes, **changes}, settings={**quick.settings, **settings}
                    )
                    patch.setitem(STUDIES, name, dataclasses.replace(STUDIES[name], quick=smaller))
                patch.setattr(sys, "argv", ["lab", name, "--quick", "--out", "results"])
                main()
    return {name: json.loads((folder / "results" / f"{name}.json").read_text()) for name in LEARNT + OTHERS}


# called "name", each would be a group of its own (conftest), measured anew in every worker
@pytest.mark.parametrize("lab", LEARNT + OTHERS)
def test_it_writes_tables_and_no_verdict(measured, lab):
    study = measured[lab]
    assert study["name"] == lab and study["verdict"] is None and study["tables"][0]["rows"]
    assert (study["tables"][-1]["title"] == "Training") == (lab != "kernels")


@pytest.mark.parametrize("lab", ("snr_trained", *OTHERS))
def test_the_models_of_the_others_can_be_trained(lab, one_device):
    """The step of training on a batch of the task, traced for each row of the quick version."""
    study = STUDIES[lab]
    with one_device(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for row in study.quick.rows.values():
            run = build_run(make_config(COMMON, study.base, row, study.quick.changes).to_dict())
            rows, options = run.config["train"]["batch_size"], run.config["train"]
            batch = {k: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for k, x in batch_arrays(run.task).items()}
            with mesh_scope(run.mesh):
                state = abstract_state(run.model, run.tx, run.mesh)
                step = make_train_step(run.model, run.tx, run.schedule, run.mesh, options)
                after, report = jax.eval_shape(step, state, batch)
            assert jax.tree.structure(after) == jax.tree.structure(state) and report["loss"].shape == ()


def test_linear_writes_follow_swaps_and_softmax_does_not(measured):
    study = measured["swap"]
    assert study["values"]["kernel linear"]["8"][0] > 0.95
    assert study["values"]["kernel softmax"]["8"][0] < 0.8
    errors = study["tables"][1]["rows"]
    assert [row["run"] for row in errors] == ["kernel linear", "kernel softmax"]
    assert all(0 < float(row["16 swaps"]) < 1e-3 for row in errors)


def test_tables_of_the_others(measured):
    """By the model that stands for theirs: what was trained, how it is named, and what the paper has."""
    (row,), (steady,) = (measured["curriculum"]["tables"][place]["rows"] for place in (0, 1))
    assert row["run"] == steady["run"] == "plain by curriculum" and row["longest trained"] in ("8", "16")
    assert {"8 swaps", "16 swaps"} & row.keys() and steady["skipped steps"] == 0
    assert measured["mqar"]["tables"][0]["rows"][0]["paper"] == "99.1%"
    assert measured["hierarchy"]["tables"][0]["rows"][0]["paper"] == "100.0%"
    assert set(measured["hierarchy"]["values"]["parity DeltaFormer"]) == {"40"}
    study = measured["words"]
    assert set(study["values"]["S3 product2"]) == {"8", "32"}
    assert [(row["group"], row["model"]) for row in study["tables"][0]["rows"]] == [("S3", "DeltaProduct, n_h = 2")]
    assert set(measured["reachability"]["values"]["DeltaFormer, 1 layer"]) == {"8"}
    (row,) = measured["capacity_trained"]["tables"][0]["rows"]
    assert row["4096 bytes"] == f"{measured['capacity_trained']['values']['delta rule 4096']:.1f} (K = 32)"


@pytest.mark.parametrize("name", MEMORIES)
def test_equal_bytes_are_those_of_the_state(name):
    """All numbers of the state but what says which slots of a cache are in use."""
    contender = MEMORIES[name]
    sizes = {"heads": 1, "key_width": 3, "value_width": 3, "options": contender.options}
    layer = nnx.eval_shape(lambda: build_memory(contender.memory, 8, **sizes, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: layer.init_state(1, 5)["memory"])
    assert contender.numbers(3, 5) == sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 2)


def test_rounding_to_integers_follows_more_objects_than_the_key_is_wide(measured):
    values = measured["kernels"]["values"]
    assert values["192 round to integers"] == 1.0
    assert values["192 linear"] < 0.75


def test_the_largest_pairs_of_a_feedforward_layer_matter_most(measured):
    (layer,) = measured["ffn"]["tables"][0]["rows"]
    assert abs(layer["Gaussian keys"] / layer["theory 1/SNR"] - 1) < 0.4
    for row in measured["ffn"]["tables"][1]["rows"]:
        assert row["change, largest"] > 2 * row["change, random"]
        assert row["without the largest"] > row["bits per byte, all pairs"]


def test_heads_that_are_not_trained_do_not_recall(measured):
    study = measured["snr_trained"]
    rows = study["tables"][0]["rows"]
    assert [row["head"] for row in rows] == [f"recall deltaformer {n}" for n in ("1.1", "1.2")]
    # the target pair is one among the others
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
