"""generate.py and show_text: from the folder of a run, several prompts in order, files of prompts, user errors."""

import json
import os
import types

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.data.corpus import wrap_source
from memformer.data.tokenization import tokenize_corpus
from memformer.data.tokenizer import ByteTokenizer
from memformer.evals import evaluate_distances, evaluate_positions, loss_by_distance, token_distances
from memformer.models import LanguageModelConfig, MemoryLM, generate
from memformer.models.generate_text import TextPiece
from memformer.pretrained import find_architecture, save_pretrained
from memformer.tasks import make_task
from memformer.training.config import RunError, default_config
from memformer.training.evaluation import load_run
from memformer.training.generation import _Terminal, load_text_model, show_text
from memformer.training.input import make_loader
from memformer.training.loop import train
from tests.processes import run_script

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")
SIZES = {"memory": "linear_attention", "width": 8, "heads": 2, "depth": 1, "feedforward": None}
SHORT = {"steps": 1, "batch_size": 8, "eval_every": 0, "eval_batches": 1, "final_batches": 1, "tensorboard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run on text."""
    where = tmp_path_factory.mktemp("generation")
    tokenize_corpus(wrap_source([f"document {i}: naïve" for i in range(80)]), where / "store")
    config = default_config(task="lm")
    config.task.length = 8
    config.data.path = str(where / "store")
    config.model.update(SIZES)
    config.model.memory_options = {"linear_attention": {}}
    config.train.update(SHORT)
    config.mesh.data = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        train(config, str(where / "run"))
    return str(where / "run")


def test_the_command(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "docu"}\n\n{"prompt": "é"}\n', encoding="utf-8")
    command = ["generate.py", f"--workdir={folder}", "--prompt=doc", f"--prompt_file={prompts}"]
    options = ["--max_new_tokens=5", "--temperature=0", f"--out={tmp_path / 'out.jsonl'}"]
    done = run_script(*command, *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["doc", "docu", "é"]
    shown = "".join(record["prompt"] + record["text"] + "\n\n" for record in records)
    assert done.stdout.startswith(shown)
    assert "12 prompt tokens, 15 new tokens" in done.stdout and "the same at any length" in done.stdout

    loaded = load_text_model(folder)
    ids = [256, *b"doc"]
    tokens = generate(loaded.model, [ids], max_new_tokens=5, stop_token=256)[0]
    assert records[0]["text"] == loaded.tokenizer.decode(tokens)


def test_rows_are_shown_in_order(capsys):
    terminal = _Terminal(["A", "B"], separate=False)
    for piece in (TextPiece(1, "y"), TextPiece(0, "x"), TextPiece(1, "z", "stop"), TextPiece(0, "", "length")):
        terminal.write(piece)
    assert capsys.readouterr().out == "Ax\n\nByz\n\n"


def test_user_errors_are_one_paragraph(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "no_text").mkdir()
    cases = [
        ({"workdir": ""}, "give the folder of a run"),
        ({"pretrained": "x"}, "give the folder of a run"),
        ({"prompts": []}, "give a prompt"),
        ({"out": "nowhere/texts.jsonl"}, "--out=nowhere/texts.jsonl: there is no folder nowhere"),
        ({"workdir": str(tmp_path)}, "no checkpoint to evaluate"),
        ({"prompt_file": str(tmp_path / "none")}, "--prompt_file=.*No such file"),
        ({"prompt_file": str(tmp_path / "bad.jsonl")}, 'line 2: expected an object with a string "prompt"'),
        ({"top_p": 2.0}, r"generation: top_p must be None or in \(0, 1\], got 2.0"),
        ({"chat": True}, "generation: chat needs a tokenizer with a chat template"),
    ]
    for changed, message in cases:
        with pytest.raises(RunError, match=message):
            show_text(**{"prompts": ["a"], "workdir": folder, "max_new_tokens": 1, **changed})


def test_a_run_without_text_is_refused(folder, tmp_path):
    os.symlink(os.path.join(folder, "checkpoints"), tmp_path / "checkpoints")
    with pytest.raises(RunError, match="holds a run on task 'lm' without a tokenizer"):
        load_text_model(str(tmp_path))


def test_several_devices_share_the_matrices(folder):
    loaded = load_text_model(folder, settings=["mesh.tensor=2", "mesh.data=4"])
    alone = load_text_model(folder, settings=["mesh.tensor=1", "mesh.data=8"])
    prompts = [[256, *b"document"]]
    got, want = (generate(each.model, prompts, max_new_tokens=3) for each in (loaded, alone))
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def scored(folder):
    """Two batches of the training split, and the loss of each target."""
    loaded, batches, losses = load_run(folder), [], []
    read = nnx.jit(lambda model, inputs, **arguments: model(inputs, **arguments).logits)
    model = loaded.module()
    loader = make_loader(loaded.task, "train", batch_size=8, seed=0)
    for batch in (next(loader), next(loader)):
        arguments = {name: batch[name] for name in ("segment_ids", "positions")}
        logits = np.asarray(read(model, batch["inputs"], **arguments), np.float64)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        losses.append(np.log(np.sum(np.exp(logits), axis=-1)) - chosen)
        batches.append(batch)
    loader.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, np.concatenate(losses)


def check_means(parts, places, batch, losses):
    """Each part is the mean over its places."""
    for part in parts:
        weights = batch["loss_weights"] * ((part["first"] <= places) & (places <= part["last"]))
        assert part["tokens"] == weights.sum()
        assert part["loss"] == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)
        assert part["perplexity"] == pytest.approx(np.exp(part["loss"]))
    assert sum(part["tokens"] for part in parts) == batch["loss_weights"].sum()


def test_loss_by_position(folder, scored, capsys):
    result = evaluate_positions(folder, split="train", batches=2, settings=["mesh.fsdp=1", "mesh.data=8"])
    bins = [(part["first"], part["last"]) for part in result["positions"]]
    assert bins == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert os.path.isfile(os.path.join(folder, "positions_train.png"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == ["1", "2", "3-4", "5-8"]
    check_means(result["positions"], scored[0]["positions"], *scored)


def test_loss_by_distance(folder, scored, capsys):
    result = evaluate_distances(folder, split="train", batches=2, settings=["mesh.fsdp=1", "mesh.data=8"])
    assert result["distances"][0]["last"] == 0 and result["distances"][-1]["last"] > 3
    assert os.path.isfile(os.path.join(folder, "distances_train.png"))
    assert capsys.readouterr().out.splitlines()[-len(result["distances"])].startswith("none ")
    batch, losses = scored
    places = loop_distances(*(batch[name] for name in ("inputs", "targets", "segment_ids")))
    check_means(result["distances"], places, batch, losses)


def test_loss_by_distance_needs_one_vocabulary():
    loaded = types.SimpleNamespace(task=make_task({"name": "coreference"}))
    with pytest.raises(RunError, match=r"one vocabulary, and task 'coreference' has \d+ ids and \d+ classes"):
        loss_by_distance(loaded)
    # bytes have a start of the text that is no class
    loaded = types.SimpleNamespace(task=make_task({"name": "text"}))
    with pytest.raises(RunError, match="--split must be"):
        loss_by_distance(loaded, split="none")


def loop_distances(inputs, targets, segment_ids):
    """Distances by plain loops; padding of `segment_ids` between two equal ids belongs to their segment."""
    found = np.zeros_like(targets)
    for row, place in np.ndindex(targets.shape):
        segment = None
        for earlier in range(place, -1, -1):
            if segment_ids[row, earlier] == 0:
                continue
            segment = segment or segment_ids[row, earlier]
            if segment_ids[row, earlier] != segment:
                break
            if inputs[row, earlier] == targets[row, place]:
                found[row, place] = place + 1 - earlier
                break
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_distances_of_tokens(packed):
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 5, (2, 8, 30))
    segments = np.repeat(rng.integers(0, 4, (8, 10)), 3, axis=1) if packed else np.ones((8, 30), int)
    got = np.asarray(token_distances(inputs, targets, segments if packed else None))
    valid = segments > 0
    assert valid.all() != packed and len(np.unique(got[valid])) > 6
    np.testing.assert_array_equal(got[valid], loop_distances(inputs, targets, segments)[valid])


def test_distances_to_no_padding():
    """Neither bytes nor a target that is no class meet the padding; errors name the argument."""
    inputs, targets, segments = np.array([[[255, 7, 1, 5]], [[-1, 255, -1, 255]], [[1, 1, 0, 1]]])
    assert token_distances(inputs.astype("uint8"), targets, segments).tolist() == [[0, 2, 0, 4]]
    with pytest.raises(ValueError, match=r"targets must be \[B, T\] = \(1, 4\), got \(1, 3\)"):
        token_distances(inputs, targets[:, 1:])


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "dtype": "float32",
}


def test_a_pretrained_model(tmp_path, capsys):
    pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install '.[hf]'")
    _, architecture = find_architecture(LLAMA)
    model = MemoryLM(LanguageModelConfig(**architecture.fields(LLAMA)), vocab_size=260, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path)
    with pytest.raises(RunError, match="there is no tokenizer.json in this folder"):
        load_text_model(pretrained=str(tmp_path))
    save_pretrained(model, tmp_path, tokenizer=ByteTokenizer())
    found = show_text(["ab"], pretrained=str(tmp_path), max_new_tokens=2)
    # no start of a document, and no ids beyond the tokenizer's, which are no text
    assert found.prompt_tokens == 2
    first = int(np.argmax(model(np.array([[*b"ab"]])).logits[0, -1, :257]))
    assert found.texts[0].startswith(ByteTokenizer().decode([first]))
    assert "bytes per token" in capsys.readouterr().out
    with pytest.raises(RunError, match="--pretrained=nowhere: folder must contain config.json"):
        load_text_model(pretrained="nowhere")
