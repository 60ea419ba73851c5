"""Repeated pairs of tokens: which they are, and their losses."""

import numpy as np
from flax import nnx

from memformer.lab.repeats import ATTENTION, REPEATS, Repeats, count_pairs, find_repeats, pair_losses
from memformer.lab.study import Result, Table
from memformer.models import LanguageModelConfig, MemoryLM

# documents of a row; the first token of each document is 0
IDS = np.array([[0, 5, 6, 7, 5, 6, 0, 5, 6], [0, 5, 6, 1, 2, 5, 6, 5, 6]])
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1]])
BATCH = {
    "inputs": IDS[:, :8],
    "targets": IDS[:, 1:],
    "segment_ids": SEGMENTS,
    "positions": np.tile(np.arange(8), (2, 1)),
}


def test_pairs_repeat_within_a_document():
    counts = count_pairs([{name: part[row] for name, part in BATCH.items()} for row in range(2)])
    assert counts[5, 6] == 6 and counts[0, 5] == 3 and (6, 8) not in counts
    pairs = find_repeats(BATCH, counts, 6)
    assert list(zip(*(part.tolist() for part in pairs), strict=True)) == [(0, 4, 2), (1, 5, 2), (1, 7, 6)]
    assert pairs.distances.tolist() == [3, 4, 2]
    # the frequent pair is left out; where none repeats, none is found
    assert find_repeats(BATCH, counts, 5).rows.size == 0


def test_losses_of_pairs():
    """Three examples, two of which the model reads at a time."""
    batch = {name: np.concatenate([part, part[:1]]) for name, part in BATCH.items()}
    config = LanguageModelConfig(memory="linear_attention", width=8, heads=1, depth=1, feedforward=None)
    model = MemoryLM(config, vocab_size=8, rngs=nnx.Rngs(0))
    read = nnx.jit(lambda model, inputs, segments: model(inputs, segment_ids=segments).logits)
    logits = np.asarray(read(model, batch["inputs"], batch["segment_ids"]), np.float64)
    pairs = Repeats(*np.array([[1, 5, 2], [0, 4, 2], [1, 7, 6], [2, 4, 2]]).T)
    scores = logits[pairs.rows, pairs.asked]
    want = np.log(np.exp(scores).sum(axis=1)) - scores[:, 6]
    np.testing.assert_allclose(pair_losses(model, batch, pairs, 2), want, rtol=1e-5)


def test_the_verdict():
    def judged(gated=0.1, plain=0.1, head=0.5):
        """On the growth of the lags of both states, and the best head of one."""
        lags = {ATTENTION: 0.0, "gated delta rule": gated, "delta rule": plain}
        same = {"bits per byte": 1.5, "lag, near": 0.02}
        rows = [{"model": name, **same, "lag, far": 0.02 + lag} for name, lag in lags.items()]
        heads = {name: {"start": [9.0, 8.0], "trained": [7.0, head]} for name in lags}
        return REPEATS.judge(Result([Table("Test split", rows)], {"1/SNR": heads}))

    assert judged().kind == "confirmed" and "gated delta rule +0.020 and +0.120" in judged().finding
    assert judged(gated=0.02).kind == judged(plain=-0.1).kind == judged(head=1.5).kind == "partly confirmed"
    assert judged(0.0, 0.02, 2.0).kind == "refuted"
