"""Checkpoints: restored on any mesh bit for bit; damage is detected, and another model is refused."""

import gc
import json
import logging
import pathlib
import resource
import shutil
import tempfile
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memformer.training import checksums
from memformer.training.checkpoint import Checkpoints
from memformer.training.orbax_errors import SaveError

CONFIG = {"model": {"memory": "delta_rule", "width": 8}, "task": {"name": "swap", "lengths": [16, 32]}}


def make_state(seed: int = 0) -> dict:
    """A state with every kind of leaf: nested and dotted names, optax tuples, bfloat16, both kinds of keys."""
    params = {
        "layers.0.kernel": jax.random.normal(jax.random.key(seed), (16, 256)),
        "layers.0.bias": jnp.full((8,), seed, jnp.bfloat16),
    }
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.PRNGKey(seed),
        "typed": jax.random.split(jax.random.key(seed), 3),
        "sums": {},
    }


def place(state, devices: int):
    """The state on a mesh of this many devices: leaves whose first axis divides are sharded."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def put(leaf):
        split = leaf.ndim > 1 and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec()))

    return jax.tree.map(put, state)


def like(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same_bits(got, want):
    def raw(leaf):
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    chex.assert_trees_all_equal_dtypes(got, want)
    chex.assert_trees_all_equal(jax.tree.map(raw, got), jax.tree.map(raw, want))


def write(folder, steps=(10, 20, 30), losses=(0.5, 0.4, 0.3), **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step, loss in zip(steps, losses, strict=True):
            assert checkpoints.save(step, make_state(step), {"position": 4 * step}, CONFIG, {"loss": loss})
    return folder


def steps_of(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def three_steps():
    """A folder with steps 10, 20, 30; tests that change it take a copy."""
    with tempfile.TemporaryDirectory() as folder:
        yield write(f"{folder}/run", keep_last=3)


@pytest.fixture
def run(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_on_another_mesh(tmp_path, devices):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, place(make_state(7), 8), {"position": 28}, CONFIG, {"loss": 0.25})
    target = like(place(make_state(0), devices))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(target)
    assert (restored.step, restored.data, restored.config, restored.metrics) == (
        7,
        {"position": 28},
        CONFIG,
        {"loss": 0.25},
    )
    assert_same_bits(restored.state, make_state(7))
    assert restored.state["params"]["layers.0.kernel"].sharding == target["params"]["layers.0.kernel"].sharding
    assert jax.tree.structure(restored.state) == jax.tree.structure(make_state(7))


def test_saving_does_not_see_later_donated_steps(tmp_path):
    """The step after a save overwrites the donated arrays while they are still being written."""
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = place({"params": {f"w{i}": jnp.zeros((64, 4096)) for i in range(8)}}, 8)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            state = advance(state)
            checkpoints.save(step, state, {}, {}, {})
            for _ in range(5):
                state = advance(state)
        state = jax.tree.map(jnp.zeros_like, state)
        for step, value in ((1, 1.0), (2, 7.0), (3, 13.0)):
            for leaf in jax.tree.leaves(checkpoints.restore(like(state), step).state):
                np.testing.assert_array_equal(leaf, value)


def test_parameters_and_config_alone(run):
    params = make_state(30)["params"]
    with Checkpoints(run) as checkpoints:
        assert_same_bits(checkpoints.restore_params(like(params)), params)
        assert_same_bits(checkpoints.restore_params(like(params), 10), make_state(10)["params"])
        parts = checkpoints.restore_parts({"params": like(params), "step": jax.ShapeDtypeStruct((), jnp.int32)})
        assert parts["step"] == 30
        assert checkpoints.config() == CONFIG and checkpoints.config(20) == CONFIG
        assert checkpoints.latest_step() == 30
    # reading for evaluation leaves the folder as it is
    assert steps_of(run) == [10, 20, 30]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1, "keep_best": 0}, [50]),
        ({"keep_last": 2, "keep_best": 1}, [20, 40, 50]),
        ({"keep_last": 1, "keep_best": 2, "best_mode": "max", "best_metric": "accuracy"}, [10, 40, 50]),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, options, kept):
    losses = {10: 0.5, 20: 0.1, 30: float("nan"), 40: 0.2, 50: 0.3}
    accuracies = {10: 0.9, 20: 0.1, 30: 0.2, 40: 0.8, 50: 0.0}
    for steps in ((10, 20, 30), (40, 50)):
        # the second half is another process: the ranking comes from the disk
        with Checkpoints(tmp_path, **options) as checkpoints:
            for step in steps:
                metrics = {"loss": losses[step], "accuracy": accuracies[step]}
                checkpoints.save(step, {"params": {"w": jnp.arange(4.0)}}, {}, {}, metrics)
    assert steps_of(tmp_path) == kept


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def garble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def largest(folder):
    """The file with the weights' bytes."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


FILES = {
    "weights": lambda step: largest(step / "state" / "ocdbt.process_0"),
    "index": lambda step: step / "state" / "manifest.ocdbt",
    "paths": lambda step: step / "state" / "_METADATA",
    "checksums": lambda step: step / "state" / "checksums.json",
    "shapes": lambda step: step / "arrays" / "metadata",
    "data": lambda step: step / "data" / "metadata",
    "config": lambda step: step / "config" / "metadata",
    "metrics": lambda step: step / "metrics" / "metrics",
}


# Each file is missing or short in one case and has other bytes in another; the weights suffer all four.
HARMS = [("weights", harm) for harm in (delete, truncate, flip_a_bit, garble)]
HARMS += [(file, (delete, truncate)[i % 2]) for i, file in enumerate(FILES) if file != "weights"]
HARMS += [(file, (garble, flip_a_bit)[i // 2 % 2]) for i, file in enumerate(FILES) if file != "weights"]


@pytest.mark.parametrize(("file", "harm"), HARMS)
def test_walks_back_from_a_damaged_step(run, caplog, file, harm):
    harm(FILES[file](run / "30"))
    with Checkpoints(run, keep_last=3) as checkpoints, caplog.at_level(logging.WARNING):
        restored = checkpoints.restore(like(make_state()))
        assert restored.step == 20 and checkpoints.latest_step() == 20
        assert_same_bits(restored.state, make_state(20))
        (message,) = [record.getMessage() for record in caplog.records if "Checkpoint 30" in record.getMessage()]
        assert "skipped" in message and ("damaged" in message or "missing" in message), message
        with pytest.raises(ValueError, match=r"checkpoint 30 in .* (damaged|not complete)"):
            checkpoints.restore(like(make_state()), 30)
        # the run reaches step 30 again: the damaged folder makes room and stays for whoever wants to look
        assert checkpoints.save(30, make_state(30), {}, CONFIG, {"loss": 0.3})
        assert checkpoints.latest_step() == 30
    assert (run / "30.damaged").is_dir() and steps_of(run) == [10, 20, 30]


def test_walks_back_over_several_steps_and_ignores_what_is_no_step(run, caplog):
    truncate(FILES["weights"](run / "30"))
    shutil.rmtree(run / "20" / "state")
    for name in ("40", "50.orbax-checkpoint-tmp", "60.damaged", "notes"):
        (run / name).mkdir()
    (run / "99").write_text("a file")
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore(like(make_state()))
        assert restored.step == 10
        assert_same_bits(restored.state, make_state(10))
        for step in (20, 30, 40):
            assert f"Checkpoint {step} in" in caplog.text
        assert checkpoints.save(15, make_state(15), {}, CONFIG, {"loss": 0.1})
    assert steps_of(run)[:2] == [10, 15] and not (run / "40").exists()


def test_all_steps_damaged_is_no_fresh_start(run):
    for step in (10, 20, 30):
        flip_a_bit(FILES["weights"](run / str(step)))
    with Checkpoints(run) as checkpoints:
        for call in (checkpoints.latest_step, checkpoints.config, lambda: checkpoints.restore(like(make_state()))):
            with pytest.raises(ValueError, match="no checkpoint in .* can be restored: 30 is damaged.*start anew"):
                call()


def change(**leaves):
    state = make_state()
    state["params"] = {**state["params"], **leaves}
    return state


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            change(**{"layers.0.kernel": jnp.zeros((16, 128))}),
            r"params/layers.0.kernel is float32 \[16, 256\] in the checkpoint and float32 \[16, 128\] here",
        ),
        (change(**{"layers.0.bias": jnp.zeros(8)}), r"layers.0.bias is bfloat16 \[8\] in .* and float32 \[8\] here"),
        (change(extra=jnp.zeros(8)), "params/extra is not in the checkpoint"),
        ({"step": jnp.int32(0)}, r"key is only in the checkpoint; .* and \d+ more"),
        ({**make_state(), "typed": jax.random.split(jax.random.PRNGKey(0), 3)}, r"typed is key<fry> \[3\] .* uint32"),
    ],
)
def test_refuses_another_model(run, target, message):
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match="checkpoint of another model: step 30 .*" + message):
            checkpoints.restore(like(target))
        with pytest.raises(ValueError, match="another model"):
            checkpoints.restore_params(like({"w": jnp.zeros(3)}))


def test_no_checkpoint_to_restore(tmp_path, run):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "5").mkdir(parents=True)
    cases = [
        ("missing", None, FileNotFoundError, "there is no such folder"),
        ("file", None, NotADirectoryError, "must be a folder of checkpoints, and is a file"),
        ("empty", None, FileNotFoundError, "has no step in it"),
        ("run", 25, FileNotFoundError, r"no checkpoint of step 25 .* its steps are \[10, 20, 30\]"),
    ]
    for name, step, error, message in cases:
        with Checkpoints(tmp_path / name) as checkpoints, pytest.raises(error, match=message):
            checkpoints.restore(like(make_state()), step)
    assert Checkpoints(tmp_path / "missing").latest_step() is None
    assert Checkpoints(tmp_path / "empty").latest_step() is None
    assert not (tmp_path / "missing").exists()
    with pytest.raises(NotADirectoryError), Checkpoints(tmp_path / "file") as checkpoints:
        checkpoints.save(1, make_state(), {}, {}, {})


def test_what_save_refuses(run, tmp_path):
    state = {"params": {"w": jnp.zeros(3)}}
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(like(make_state()))
        # a run that ends where it was restored has nothing to save
        assert not checkpoints.save(30, make_state(30), {}, CONFIG, {"loss": 0.3})
    with Checkpoints(run) as checkpoints:
        for step in (25, 30):
            with pytest.raises(ValueError, match="already holds step 30"):
                checkpoints.save(step, state, {}, {}, {"loss": 0.1})
    with Checkpoints(tmp_path / "new") as checkpoints:
        with pytest.raises(ValueError, match="only jax arrays, got ndarray at params/w"):
            checkpoints.save(1, {"params": {"w": np.zeros(3)}}, {}, {}, {})
        with pytest.raises(ValueError, match="one without elements at params/w"):
            checkpoints.save(1, {"params": {"w": jnp.zeros((0, 3))}}, {}, {}, {})
        with pytest.raises(ValueError, match="data must be a dict that JSON can represent"):
            checkpoints.save(1, state, {"position": jnp.zeros(3)}, {}, {})
        with pytest.raises(ValueError, match=r"metrics must have 'loss', .* got \['accuracy'\]"):
            checkpoints.save(1, state, {}, {}, {"accuracy": 1.0})
    assert not (tmp_path / "new").exists()


def test_each_file_is_read_once_and_by_the_process_that_wrote_it(tmp_path, monkeypatch):
    read, checksum = [], checksums._checksum
    monkeypatch.setattr(checksums, "_checksum", lambda path: read.append(str(path)) or checksum(path))
    write(tmp_path / "run", steps=(10,), losses=(0.5,))
    arrays = [path for path in read if "ocdbt.process_0" in path]
    assert arrays == read[: len(arrays)] and len(set(read)) == len(read)
    step = epath.Path(tmp_path / "run" / "10")
    assert not list(pathlib.Path(step).rglob("checksums.process_*"))
    # of two processes, each reads its own half
    moved = step / "state" / "ocdbt.process_1"
    (step / "state" / "ocdbt.process_0").rename(moved)
    text = (step / "state" / "checksums.json").read_text().partition("\n")[2].replace("ocdbt.process_0", moved.name)
    (step / "state" / "checksums.json").write_text(f"{zlib.crc32(text.encode())}\n{text}")
    flip_a_bit(largest(pathlib.Path(moved)))
    assert checksums.damage(step, True, (0, 2)) is None
    assert f"state/{moved.name}/d/" in checksums.damage(step, True, (1, 2)) == checksums.damage(step, True)


@pytest.fixture
def no_large_files():
    """Files cannot grow beyond 2 KiB: TensorStore's writes fail as on a full disk, and Orbax abandons the others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # noqa: E731
    yield lambda: limit(2048)
    limit(soft)


def test_a_failed_save_is_one_error_and_no_message(tmp_path, no_large_files, capfd, caplog):
    state = {"params": {f"w{i}": jax.random.normal(jax.random.key(i), (32, 32)) for i in range(8)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, CONFIG, {"loss": 0.5})
        checkpoints.wait()
        no_large_files()
        for step in (2, 3):
            with pytest.raises(SaveError, match=f"checkpoint {step} in .*: File too large .*MiB free.*step 1"):
                checkpoints.save(step, state, {}, CONFIG, {"loss": 0.5})
                checkpoints.wait()

    async def write_fragment():
        pass

    # one that had not begun, as happens now and then
    write_fragment.__qualname__ = "async_serialize_from_host.<locals>.write_fragment"
    write_fragment()
    # asyncio and Python report the abandoned writes when they are collected
    gc.collect()
    assert caplog.records == [] and capfd.readouterr() == ("", "")
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_best": -1}, {"best_mode": "smallest"}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def test_nothing_of_orbax_reaches_the_terminal(run, capfd, caplog):
    """Covers the life of a folder, including a half-written step of a killed run."""
    (run / "40.orbax-checkpoint-tmp").mkdir()
    with caplog.at_level(logging.DEBUG, logger="absl"), Checkpoints(run) as checkpoints:
        checkpoints.restore(like(make_state()))
        checkpoints.save(40, make_state(40), {}, CONFIG, {"loss": 0.2})
    assert json.loads((run / "40" / "config" / "metadata").read_text()) == CONFIG
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    assert capfd.readouterr() == ("", "")
    assert not (run / "40.orbax-checkpoint-tmp").exists()
