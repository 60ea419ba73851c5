"""The same numbers as transformers, for every architecture: logits, generation, gradients, and the way back."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import generate
from memformer.models.generate import pad_prompts
from memformer.pretrained import ARCHITECTURES, load_pretrained, read_parameters, save_pretrained
from tests.numeric import assert_close, relative_rms
from tests.pretrained.fla_reference import MODELS, architecture
from tests.pretrained.references import REFERENCES, VARIANTS, build, prompts

# Other packages emit warnings while they are imported and run.
pytestmark = pytest.mark.filterwarnings("default")

LOGITS = {"float32": 1e-5, "bfloat16": 1e-2}
IDS = np.array([prompts((23,), seed)[0] for seed in range(2)])


@pytest.fixture(scope="module")
def peers():
    """(torch, transformers)."""
    reason = "needs PyTorch and transformers: pip install '.[peers]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("safetensors", reason=reason)
    torch.set_num_threads(1)
    return torch, transformers


@pytest.fixture(scope="module")
def reference(peers, tmp_path_factory):
    """By name: (model of transformers, the folder that it is saved in)."""

    @functools.cache
    def get(name: str):
        model = build(name, *peers)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return model, folder

    return get


loaded = functools.cache(load_pretrained)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1, has_aux=True)
def slopes_and_logits(graph, parameters, rest):
    logits = nnx.merge(graph, parameters, rest, copy=True)(jnp.asarray(IDS)).logits
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(IDS)[:, 1:, None], axis=-1)
    return -jnp.mean(chosen), logits


@functools.cache
def computed(folder):
    """Logits, and the gradient of the loss by path; models of one structure share the program."""
    slopes, logits = slopes_and_logits(*nnx.split(loaded(folder)[0], nnx.Param, ...))
    return np.asarray(logits), {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(slopes)}


# One function for all calls, so that models of one structure share a program.
run = nnx.jit(lambda model, ids: model(ids).logits)


def ours(model, ids):
    return np.asarray(run(model, jnp.asarray(ids)), np.float64)


def theirs(torch, model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids))).logits.float().numpy()


def test_every_architecture_has_a_reference():
    whole = {name for name, row in ARCHITECTURES.items() if row.config is not None}
    assert {row.model for row in REFERENCES.values()} | {architecture(name) for name in MODELS} == whole


@pytest.mark.parametrize("name", REFERENCES)
def test_logits(peers, reference, name):
    torch, _ = peers
    model, folder = reference(name)
    got, want = computed(folder)[0], theirs(torch, model, IDS)
    assert np.std(want) > 0.5, "logits hardly depend on the input"
    assert_close(got, want, LOGITS["float32"])


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in VARIANTS])
def test_logits_in_bfloat16(peers, reference, name, tmp_path):
    torch, _ = peers

    def logits(model, folder):
        """Theirs in float32 and in bfloat16, and ours in bfloat16."""
        half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
        got = load_pretrained(folder, dtype="bfloat16")[0]
        assert {x.dtype for x in jax.tree.leaves(nnx.state(got, nnx.Param))} == {jnp.dtype("bfloat16")}
        return theirs(torch, model, IDS), theirs(torch, half, IDS), ours(got, IDS)

    initial = build(name, *peers, initial=True)
    initial.save_pretrained(tmp_path)
    exact, _, got = logits(initial, tmp_path)
    assert relative_rms(got, exact) < LOGITS["bfloat16"]
    # Random maps of gain 2 amplify each rounding: theirs is off by up to 3e-2 itself. Ours must be as near to float32.
    exact, half, got = logits(*reference(name))
    assert relative_rms(got, exact) < max(LOGITS["bfloat16"], 1.3 * relative_rms(half, exact))


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in VARIANTS])
def test_greedy_generation_with_left_padding(peers, reference, name):
    torch, _ = peers
    model, folder = reference(name)
    ids, segments = pad_prompts(prompts())
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    want = model.generate(torch.tensor(ids).long(), attention_mask=torch.tensor(segments).long(), **options)
    want = want[:, ids.shape[1] :].numpy()
    assert want.shape[1] == 32 and len(np.unique(want)) > 10, "the generated tokens are too much alike"
    got = generate(loaded(folder)[0], prompts(), max_new_tokens=32)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", REFERENCES)
def test_gradient_of_the_loss(peers, reference, name, tmp_path):
    torch, _ = peers
    model, folder = reference(name)
    ids = torch.tensor(IDS)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    # Conversions are linear: gradients convert as weights do, when saved in their place.
    slopes = copy.deepcopy(model)
    with torch.no_grad():
        for slope, parameter in zip(slopes.parameters(), model.parameters(), strict=True):
            slope.copy_(parameter.grad)
    slopes.save_pretrained(tmp_path)
    want, got = dict(read_parameters(tmp_path)), computed(folder)[1]
    largest = max(float(np.abs(want[name]).max()) for name in got)
    for name, slope in got.items():
        # Without rotary positions a bias of the keys moves all scores of a query alike: its exact gradient is 0.
        if float(np.abs(want[name]).max()) < 1e-6 * largest:
            assert float(np.abs(slope).max()) < 1e-6 * largest, name
        else:
            assert_close(slope, want[name], 1e-4, name)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_way_back(peers, reference, name, tmp_path):
    torch, _ = peers
    model, folder = reference(name)
    network, _, raw = loaded(folder)
    # Into several files, with an index.
    save_pretrained(network, tmp_path, config=raw, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = type(model).from_pretrained(tmp_path, dtype="auto").eval()
    # Not bit for bit: a loaded model may sum its experts in another order.
    assert_close(theirs(torch, back, IDS), theirs(torch, model, IDS), 1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    again = load_pretrained(tmp_path)[0]
    assert again.config == network.config
    for got, want in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(network)), strict=True):
        assert np.array_equal(got, want)
    # Without the other fields of the config the function is the same.
    save_pretrained(network, tmp_path / "bare", config={"architectures": raw["architectures"]})
    assert len(list((tmp_path / "bare").glob("*.safetensors"))) == 1
    bare = type(model).from_pretrained(tmp_path / "bare").eval()
    assert_close(theirs(torch, bare, IDS), theirs(torch, model, IDS), 1e-6)
