"""Softmax attention against the T x T formula: windows, encoders, huge scores, its own errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from memformer.core.mask import Mask
from memformer.ops.attention import parts, tiled
from memformer.ops.attention.tiles import TileMask
from tests.numeric import FORWARD, GRADIENT, assert_close

LENGTH = 39
# Padding before, inside and after a segment; the second row has none.
IDS = np.array([[0] * 3 + [1] * 10 + [0] * 2 + [1] * 3 + [4] * 15 + [0] * 6, [2] * 20 + [3] * 19], np.int32)


def arrays(scale=1.0):
    rng = np.random.default_rng(1)
    shapes = ((4, 8), (2, 8), (2, 6))
    q, k, v = (rng.standard_normal((2, LENGTH, *s)).astype("float32") for s in shapes)
    return np.float32(scale) * q, k, v


def formula(q, k, v, decay=None, sinks=None, *, causal, window, ids):
    """The whole T x T formula in float64, in NumPy; distances count valid tokens.

    Returns:
      Output, and the gradients of the sum of its sine with respect to all arrays given.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)))
    rank, valid, root = np.cumsum(ids != 0, axis=1), ids != 0, np.sqrt(q.shape[-1])
    distance = rank[:, :, None] - rank[:, None, :]
    visible = (ids[:, :, None] == ids[:, None, :]) & valid[:, :, None] & (distance >= (0 if causal else -LENGTH))
    if window is not None:
        visible &= np.abs(distance) < window
    scores = np.einsum("bthk,bshk->bhts", q, k) / root
    # Of t, s and r: each gap is summed on its own, without padding.
    step = np.arange(LENGTH)
    between = ((step > step[:, None]) & (step <= step[:, None, None])).astype("float64")
    if decay is not None:
        scores += np.einsum("tsr,brh->bhts", between, np.where(valid[..., None], np.maximum(decay, -1e4), 0.0))
    weights = np.where(visible[:, None], np.exp(scores), 0.0)
    end = np.zeros(q.shape[2]) if sinks is None else np.exp(np.asarray(sinks, np.float64))
    total = np.sum(weights, axis=-1) + end[:, None]
    total = np.where(total > 0, total, 1.0)
    share = weights / total[..., None]
    output = np.einsum("bhts,bshv->bthv", share, v)

    slope = np.cos(output)
    of_share = np.einsum("bthv,bshv->bhts", slope, v)
    mean = np.sum(share * of_share, axis=-1)
    of_scores = share * (of_share - mean[..., None])
    grouped = lambda x: np.sum(x.reshape(*x.shape[:2], -1, 2, x.shape[-1]), axis=3)  # noqa: E731
    gradient = [
        np.einsum("bhts,bshk->bthk", of_scores, k) / root,
        grouped(np.einsum("bhts,bthk->bshk", of_scores, q) / root),
        grouped(np.einsum("bhts,bthv->bshv", share, slope)),
    ]
    if decay is not None:
        gradient.append(np.einsum("bhts,tsr->brh", of_scores, between) * valid[..., None])
    if sinks is not None:
        gradient.append(-np.sum(end[:, None] / total * mean, axis=(0, 2)))
    return output, gradient


def check_formula(given, options):
    """Both implementations, outputs and gradients; decay and sinks are the fourth and fifth of the arrays."""
    want, want_gradient = formula(*given, **options, ids=IDS)
    for kind in ({"implementation": "chunked", "chunk_size": 8}, {"implementation": "recurrent"}):

        def loss(given, kind=kind):
            more = dict(zip(("decay", "sinks"), given[3:], strict=False))
            output, _ = mf.softmax_attention(*given[:3], **more, **options, **kind, segment_ids=jnp.asarray(IDS))
            return jnp.sum(jnp.sin(output)), output

        gradient, got = jax.jit(jax.grad(loss, has_aux=True))(given)
        assert_close(got, want, FORWARD["float32"], "output")
        assert_close(list(gradient), want_gradient, GRADIENT["float32"], "gradient")


@pytest.mark.parametrize(("causal", "window"), [(True, 7), (False, 5)])
def test_against_the_formula(causal, window):
    check_formula(arrays(), {"causal": causal, "window": window})


def test_decay_and_sinks_against_the_formula():
    """Forgetting per query head, one token of which forgets everything, and a slot that holds nothing.

    The shared suite has a decay within a window.
    """
    rng = np.random.default_rng(3)
    decay = -np.exp(rng.uniform(-3, 1, (2, LENGTH, 4)))
    decay[:, 12, 1] = -np.inf
    given = (*arrays(), decay.astype("float32"), rng.standard_normal(4).astype("float32"))
    check_formula(given, {"causal": True, "window": None})


def test_decoding_with_decay():
    """A fixed cache carries the cumulative decay; a growing one agrees."""
    q, k, v = arrays()
    decay = -np.exp(np.sin(np.arange(2 * LENGTH * 4, dtype="float32"))).reshape(2, LENGTH, 4)
    want, _ = jax.jit(mf.softmax_attention)(q, k, v, decay=decay)
    sizes = {"batch": 2, "capacity": LENGTH, "groups": 2, "key_width": 8, "value_width": 6}
    fixed = mf.init_cache("softmax_attention", **sizes, decay_heads=4)
    call = jax.jit(lambda q, k, v, decay, cache: mf.softmax_attention(q, k, v, decay=decay, initial_state=cache))
    cache, parts = fixed, []
    for first, last in ((0, 36), (36, 37), (37, 38), (38, 39)):
        output, cache = call(*(x[:, first:last] for x in (q, k, v, decay)), cache)
        parts.append(output)
    assert_close(np.concatenate(parts, axis=1), want, FORWARD["float32"])
    for message, state, given in (
        ("decay must be given where initial_state holds decays", fixed, None),
        ("decay must be None where initial_state holds no decays", mf.init_cache("softmax_attention", **sizes), decay),
        ("decay_fraction must be None without a decay_whole", dataclasses.replace(fixed, decay_whole=None), None),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda given=given, state=state: mf.softmax_attention(q, k, v, decay=given, initial_state=state)
            )


def test_cudnn_refuses_decay_and_sinks():
    q, k, v = arrays()
    for options in ({"decay": jnp.zeros((2, LENGTH, 4))}, {"sinks": jnp.zeros(4)}):
        with pytest.raises(NotImplementedError, match="no decay and no sinks.*'chunked'"):
            jax.eval_shape(lambda options=options: mf.softmax_attention(q, k, v, implementation="cudnn", **options))


def test_window_and_encoder_without_segments():
    """Only the padding of the last chunk is masked."""

    def run(causal, window, *given):
        return mf.softmax_attention(*given, causal=causal, window=window, chunk_size=8)[0]

    for causal, window in ((True, 7), (False, None)):
        want, _ = formula(*arrays(), causal=causal, window=window, ids=np.ones_like(IDS))
        got = jax.jit(run, static_argnums=(0, 1))(causal, window, *arrays())
        assert_close(got, want, FORWARD["float32"], f"causal {causal}")


def test_huge_scores_stay_finite():
    """Scores of thousands: the largest takes all."""
    q, k, v = arrays(scale=1e4)
    output, gradient = jax.jit(
        jax.value_and_grad(
            lambda q: (lambda o: (jnp.sum(o), o))(mf.softmax_attention(q, k, v, chunk_size=8)[0]), has_aux=True
        )
    )(q)
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, axis=2))
    scores = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf)
    best, ordered = np.argmax(scores, axis=-1), np.sort(scores, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 100
    assert np.mean(clear) > 0.9
    rows, heads = np.arange(2)[:, None, None], np.arange(4)[None, :, None]
    want = np.repeat(v, 2, axis=2)[rows, best, heads]
    assert np.array_equal(np.swapaxes(np.asarray(output[1]), 1, 2)[clear], want[clear])
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("causal", [True, False])
def test_window_beyond_int32_is_no_limit(causal):
    call = lambda window: jax.make_jaxpr(lambda *x: mf.softmax_attention(*x, causal=causal, window=window))(*arrays())  # noqa: E731
    assert str(call(1 << 40)) == str(call(None))


def test_window_skips_tiles():
    """Tiles behind the window are not visited: keys there may even be infinite."""
    q, k, v = arrays()
    spoiled = np.concatenate([np.full_like(k[:, :8], np.inf), k[:, 8:]], axis=1)
    call = jax.jit(lambda k: mf.softmax_attention(q, k, v, window=4, chunk_size=8)[0])
    want, got = np.asarray(call(k)), np.asarray(call(spoiled))
    assert np.array_equal(got[:, 16:], want[:, 16:])


def test_errors():
    q, k, v = arrays()
    state = mf.init_cache("softmax_attention", batch=2, capacity=8, groups=2, key_width=8, value_width=6)
    for message, options in (
        ("window must be a positive integer or None, got 0", {"window": 0}),
        ("decay must be None where causal is False", {"causal": False, "decay": jnp.zeros((2, LENGTH, 4))}),
        (r"sinks must be \[H\] = \(4,\), got \(2,\)", {"sinks": jnp.zeros(2)}),
        ("initial_state must be None where causal is False", {"causal": False, "initial_state": state}),
        ("scale must be a finite number or None, got 'big'", {"scale": "big"}),
        ("segment_ids must be", {"segment_ids": jnp.ones((2, 3), "int32")}),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda options=options: mf.softmax_attention(q, k, v, **options))
    plain = mf.KVCache(k, v, np.ones(k.shape[:2], bool), LENGTH)
    with pytest.raises(ValueError, match="initial_state.length must be an array, got int"):
        jax.eval_shape(lambda: mf.softmax_attention(q, k, v, initial_state=plain))
    with pytest.raises(ValueError, match="capacity"):
        mf.init_cache("softmax_attention", batch=1, capacity=-1, groups=1, key_width=8, value_width=8)
    for dtype in ("int32", "half precision"):
        with pytest.raises(ValueError, match=f"dtype must be a floating dtype such as 'float32', got '{dtype}'"):
            mf.init_cache("softmax_attention", batch=1, capacity=1, groups=1, key_width=8, value_width=8, dtype=dtype)


def test_large_tiles_are_equal(monkeypatch):
    """On a CPU tiles have at most 512 tokens, divide the call evenly, and compute what small tiles do."""
    monkeypatch.setattr(tiled, "chip", lambda: "cpu")
    rng = np.random.default_rng(11)
    given = [jnp.asarray(rng.standard_normal((1, 600, heads, 4)), "float32") for heads in (2, 1, 1)]

    def run(size):
        return jax.jit(
            jax.value_and_grad(
                lambda *x: jnp.sum(jnp.sin(mf.softmax_attention(*x, chunk_size=size, implementation="chunked")[0])),
                (0, 1, 2),
            )
        )

    default, equal, small = (run(size) for size in (None, 304, 128))
    assert default.lower(*given).as_text() == equal.lower(*given).as_text()
    assert_close(default(*given), small(*given), 2e-6)


def test_heads_in_parts(monkeypatch):
    """On one CPU device packed heads are read one after another; outputs and gradients are those of all at once."""
    rng = np.random.default_rng(12)
    q = jnp.asarray(rng.standard_normal((2, 20, 6, 4)), "float32")
    k, v = (jnp.asarray(rng.standard_normal((2, 20, 3, 4)), "float32") for _ in "kv")
    ids = jnp.asarray(np.arange(20) // 9, jnp.int32)[None].repeat(2, 0)

    def run(parts_of_one):
        monkeypatch.setattr(parts, "_one_cpu", lambda: parts_of_one)
        monkeypatch.setattr(parts, "_cores", lambda: 2)

        def loss(q, k, v):
            output, _ = mf.softmax_attention(q, k, v, segment_ids=ids, chunk_size=8, implementation="chunked")
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert_close(run(True), run(False), 1e-6)
    mask = TileMask(Mask(), jnp.int32(0), None, None)
    monkeypatch.setattr(parts, "_one_cpu", lambda: True)
    # Two cores: pairs of the six heads of both examples, or of one head where each example has a mask of its own.
    assert parts.head_parts(mask, 2, 3) == (3, 1)
    assert parts.head_parts(mask._replace(mask=Mask(query_segment=ids)), 2, 3) == (3, 2)
