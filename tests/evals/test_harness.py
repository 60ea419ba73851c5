"""Likelihoods of text against sums over single tokens; the evaluation harness on a task file of one's own."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.data import ByteTokenizer
from memformer.evals import TextScorer, harness_model, run_harness
from memformer.evals.scoring import _score_tokens
from memformer.models import MemoryLM, generate
from memformer.models.config import LanguageModelConfig

BYTES = ByteTokenizer()
START = BYTES.end_of_text


def build(memory="linear_attention", **config):
    config = {"width": 8, "heads": 2, "depth": 1, "feedforward": None, **config}
    return MemoryLM(LanguageModelConfig(memory=memory, **config), vocab_size=257, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def logits(model):
    """Logits of one sequence, in float64; later ids do not reach earlier ones, so that one program serves all."""
    graph, parameters = nnx.split(model)
    call = jax.jit(lambda parameters, ids: nnx.merge(graph, parameters)(ids).logits)

    def logits(ids):
        padded = np.pad(np.asarray(ids, np.int32), (0, 32 - len(ids)))
        return np.asarray(call(parameters, padded[None])[0, : len(ids)], np.float64)

    return logits


def brute_force(logits, ids, count):
    """Sum over the last `count` ids of the log-probability of each, and whether each is the most probable."""
    scores = logits(ids[:-1])
    scores = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
    places = range(len(ids) - 1 - count, len(ids) - 1)
    return sum(scores[i, ids[i + 1]] for i in places), all(np.argmax(scores[i]) == ids[i + 1] for i in places)


def test_likelihoods(model, logits):
    scorer = TextScorer(model, BYTES, batch_size=3)
    # a letter behind which the most probable byte is another letter
    best = {letter: int(np.argmax(logits([START, letter])[-1])) for letter in range(97, 123)}
    letter = next(letter for letter, after in best.items() if 33 <= after < 127)
    expected = (chr(letter), chr(best[letter]))
    pairs = [("ab", "cde"), ("", "x"), ("é is", " a letter"), expected, ("spaces  ", "end"), ("a" * 20, "b")]
    found = scorer.loglikelihood(pairs)
    for (context, continuation), (score, best) in zip(pairs, found, strict=True):
        ids = [START, *(context + continuation).encode()]
        count = len(continuation.encode()) + len(context) - len(context.rstrip())
        want, want_best = brute_force(logits, ids, count)
        assert score == pytest.approx(want, rel=1e-5) and best == want_best
    # only the greedy continuation is the most probable one
    assert [best for _, best in found] == [False, False, False, True, False, False]


def test_a_pretrained_model_has_no_document_start(model, logits):
    scorer = TextScorer(model, BYTES, batch_size=3, document_start=False)
    found = scorer.loglikelihood([("ab", "cd"), ("", "cd")])
    for (score, _), ids in zip(found, ([*b"abcd"], [START, *b"cd"]), strict=True):
        assert score == pytest.approx(brute_force(logits, ids, 2)[0], rel=1e-5)


def test_rolling_likelihoods(model, logits):
    texts = ["abcdefghij", "é", "", "x" * 13]
    whole = TextScorer(model, BYTES, batch_size=3).loglikelihood_rolling(texts)
    cut = TextScorer(model, BYTES, batch_size=3, max_length=4).loglikelihood_rolling(texts)
    for text, score, windows in zip(texts, whole, cut, strict=True):
        ids = [START, *text.encode()]
        assert score == pytest.approx(brute_force(logits, ids, len(ids) - 1)[0], rel=1e-5)
        # windows of four ids; the last one is full
        want = 0.0
        for begin in range(1, len(ids), 4):
            end = min(begin + 4, len(ids))
            want += brute_force(logits, ids[max(0, end - 5) : end], end - begin)[0]
        assert windows == pytest.approx(want, rel=1e-5)


def test_a_long_context_loses_its_beginning(model, logits):
    (score, _), = TextScorer(model, BYTES, batch_size=3, max_length=4).loglikelihood([("abcdef", "gh")])  # fmt: skip
    assert score == pytest.approx(brute_force(logits, [*b"defgh"], 2)[0], rel=1e-5)


def test_continuations(model):
    scorer = TextScorer(model, BYTES, batch_size=2)
    contexts = ["ab", "c", "longer"]
    found = scorer.generate_until([(context, {"max_gen_toks": 4, "until": ["\n\n"]}) for context in contexts])
    prompts = [[START, *context.encode()] for context in contexts]
    want = generate(model, prompts, max_new_tokens=4, stop_token=START)
    assert list(found) == [BYTES.decode(ids) for ids in want]
    stop = found[0][1]
    (cut,) = scorer.generate_until([("ab", {"max_gen_toks": 4, "until": stop})])
    assert cut == found[0][: found[0].index(stop)]


def test_one_program_per_bucket(model):
    scorer = TextScorer(model, BYTES, batch_size=3)
    scorer.loglikelihood([("ab", "c")])
    before = _score_tokens._cache_size()
    scorer.loglikelihood([("a" * n, "b") for n in (1, 5, 9, 13, 17, 25)])
    assert _score_tokens._cache_size() <= before + 1


def test_user_errors(model):
    scorer = TextScorer(model, BYTES, max_length=4)
    for call, message in (
        (lambda: scorer.loglikelihood([("a", "")]), "continuation must have a token, got ''"),
        (lambda: scorer.loglikelihood([("a", "bcdef")]), "continuation must have at most max_length = 4 tokens, got 5"),
        (lambda: scorer.generate_until([("a", {"beams": 2})]), "generation has no key 'beams'; known keys: until, max"),
        (lambda: TextScorer(model, BYTES, batch_size=0), "batch_size must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_learned_positions_are_the_limit():
    scorer = TextScorer(build(positions="learned", max_length=6), BYTES, batch_size=1)
    assert scorer.max_length == 6
    assert np.isfinite(scorer.loglikelihood_rolling(["twenty bytes of text"])[0])


TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {validation: capitals.jsonl}
validation_split: validation
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_a_task_file_of_ones_own(model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [("Spain", ["Madrid", "Lima"], 0), ("Peru", ["Madrid", "Lima"], 1), ("Chad", ["N'Djamena", "Oslo"], 0)]
    lines = [json.dumps(dict(zip(("country", "choices", "answer"), row, strict=True))) for row in rows]
    (tmp_path / "capitals.jsonl").write_text("\n".join(lines))
    (tmp_path / "capitals.yaml").write_text(TASK)
    scorer = TextScorer(model, BYTES, batch_size=3)
    found = run_harness(scorer, [str(tmp_path / "capitals.yaml")])
    pairs = [(f"The capital of {country} is", f" {choice}") for country, choices, _ in rows for choice in choices]
    scores = np.array([score for score, _ in scorer.loglikelihood(pairs)]).reshape(3, 2)
    want = np.mean(np.argmax(scores, axis=1) == [answer for _, _, answer in rows])
    assert found["results"]["capitals"]["acc,none"] == pytest.approx(want)
    with pytest.raises(ValueError, match="tasks must be YAML files or names that the harness knows, got nosuch"):
        run_harness(scorer, ["nosuch"])


def test_the_adapter_answers_all_requests(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    scorer = TextScorer(model, BYTES, batch_size=3)
    lm = harness_model(scorer)
    for kind, arguments in (
        ("loglikelihood", ("ab", "cde")),
        ("loglikelihood_rolling", ("abcd",)),
        ("generate_until", ("ab", {"max_gen_toks": 4, "until": ["\n\n"]})),
    ):
        request = Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
        given = arguments if len(arguments) == 2 else arguments[0]
        assert getattr(lm, kind)([request]) == getattr(scorer, kind)([given])


def test_a_missing_package_names_the_extra(model):
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'memformer-jax\[evals\]'"):
            harness_model(TextScorer(model, BYTES))
