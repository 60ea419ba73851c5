"""Retrieval signal-to-noise of a memory of N pairs.

A memory holds sum_j kappa(k_j, .) v_j. Queried with a stored key k_i it gives c v_i + r, where c = kappa(k_i, k_i)
and r is the answer of the other keys. For i.i.d. keys N(0, I_d), arXiv 2505.19488 section 2 derives 1 / SNR =
E |r|^2 / (c^2 |v|^2):

    linear          N / d
    relu            N / (2 d)
    exp(s / tau)    N exp(2 d (1 / tau^2 - 1 / tau)); at tau = sqrt(d): N exp(2 - 2 sqrt d)
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from memformer.core.similarity import Kernel, similarity
from memformer.lab.plots import DOTTED, Lines
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade

__all__ = ["KEYS", "SIMILARITIES", "SNR", "Similarity", "inverse_snr", "width_needed"]

# Keys queried in one simulation, and width of the values.
QUERIES, VALUES = 32, 32

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A similarity kernel or feature map, and its theory.

    Attributes:
      scores: (queries [M, d], keys [N, d]) -> kappa [M, N].
      inverse: (d, N) -> 1 / SNR for i.i.d. Gaussian keys; None where there is no formula.
    """

    scores: Scores
    inverse: Callable[[int, int], float] | None = None


def _kernel(kernel: Kernel) -> Scores:
    def scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        products = (queries @ keys.T) * np.float32(kernel.scale_for(keys.shape[1]))
        if kernel.name in ("exp", "softmax"):
            # a factor per row does not change the ratio of signal to noise
            products = products - products.max(axis=1, keepdims=True)
        values = np.asarray(similarity(kernel, products))
        return values / values.sum(axis=1, keepdims=True) if kernel.normalized else values

    return scores


def _feature_map(phi: Callable[[np.ndarray], np.ndarray]) -> Scores:
    return lambda queries, keys: phi(queries) @ phi(keys).T


def _tempered(factor: float) -> Similarity:
    """exp(s / tau) with tau = factor * sqrt(d)."""

    def scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return _kernel(Kernel("exp", scale=1 / (factor * math.sqrt(keys.shape[1]))))(queries, keys)

    def inverse(width: int, pairs: int) -> float:
        tau = factor * math.sqrt(width)
        return pairs * math.exp(2 * width * (1 / tau**2 - 1 / tau))

    return Similarity(scores, inverse)


def _dpfp(x: np.ndarray, order: int = 3) -> np.ndarray:
    """Deterministic parameter-free projection (2102.11174): products of relu(x), relu(-x) with its own rotations."""
    both = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    return np.concatenate([both * np.roll(both, shift, axis=-1) for shift in range(1, order + 1)], axis=-1)


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


SIMILARITIES: dict[str, Similarity] = {
    "linear": Similarity(_kernel(Kernel("linear")), lambda width, pairs: pairs / width),
    "relu": Similarity(_kernel(Kernel("relu")), lambda width, pairs: pairs / (2 * width)),
    "round": Similarity(_kernel(Kernel("round"))),
    "elu": Similarity(_feature_map(_elu)),
    "dpfp": Similarity(_feature_map(_dpfp)),
    "exp, tau = sqrt d": _tempered(1.0),
    "exp, tau = 2 sqrt d": _tempered(2.0),
    "softmax": Similarity(_kernel(Kernel("softmax")), _tempered(1.0).inverse),
}


def _gaussian(rng: np.random.Generator, pairs: int, width: int) -> np.ndarray:
    return rng.standard_normal((pairs, width), np.float32)


def _unit(rng: np.random.Generator, pairs: int, width: int) -> np.ndarray:
    keys = _gaussian(rng, pairs, width)
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def _correlated(rng: np.random.Generator, pairs: int, width: int) -> np.ndarray:
    """Keys that share a direction: two of them have cosine 1/2 on average."""
    return np.float32(math.sqrt(0.5)) * (_gaussian(rng, 1, width) + _gaussian(rng, pairs, width))


KEYS = {"gaussian": _gaussian, "unit": _unit, "correlated": _correlated}


def inverse_snr(kernel: Similarity, keys: str, width: int, pairs: int, seed: int) -> np.ndarray:
    """|r|^2 / (c^2 |v|^2) of some stored keys, [min(pairs, 32)].

    Args:
      kernel: to measure.
      keys: a name in `KEYS`.
      width: d.
      pairs: N.
      seed: of keys and values.

    Example:
      >>> inverse_snr(SIMILARITIES["linear"], "gaussian", 16, 4, 0).shape
      (4,)
    """
    rng = np.random.default_rng((seed, width, pairs))
    stored = KEYS[keys](rng, pairs, width)
    values = rng.standard_normal((pairs, VALUES), np.float32)
    asked = np.arange(min(pairs, QUERIES))
    answers = np.array(kernel.scores(stored[asked], stored))
    signal = answers[asked, asked]
    answers[asked, asked] = 0
    noise = np.sum(np.square(answers @ values, dtype=np.float64), axis=1)
    return noise / (np.square(signal, dtype=np.float64) * np.sum(np.square(values[asked], dtype=np.float64), axis=1))


def _median(kernel: Similarity, keys: str, width: int, pairs: int, seeds: int) -> tuple[float, float, float]:
    """Median over queries and seeds, and the band of the seeds' own medians (10% to 90%)."""
    medians = [float(np.median(inverse_snr(kernel, keys, width, pairs, seed))) for seed in range(seeds)]
    return float(np.median(medians)), *np.quantile(medians, (0.1, 0.9)).tolist()


def width_needed(kernel: Similarity, pairs: int, widths: Sequence[int], seeds: int) -> int | None:
    """The smallest of rising `widths` at which the signal is no less than the noise, Gaussian keys; None if at none.

    Found by halving: noise falls as the width grows.
    """
    first = bisect.bisect_left(widths, True, key=lambda width: _median(kernel, "gaussian", width, pairs, seeds)[0] <= 1)
    return widths[first] if first < len(widths) else None


def _measure(runs: Runs, settings: Settings) -> Result:
    widths, counts, seeds = (settings[name] for name in ("widths", "pairs", "seeds"))
    title = f"1 / SNR with N = {counts[-1]} pairs (median over queries and {seeds} seeds)"
    needed = Table("Width at which SNR is 1, Gaussian keys", _needed(settings["needed"]))
    values = {
        "widths": widths,
        "pairs": counts,
        "seeds": seeds,
        "worst factor to theory": {
            name: round(_worst(name, widths, counts, seeds), 3) for name in ("linear", "relu", "exp, tau = sqrt d")
        },
    }
    return Result([Table(title, _rows(widths, counts[-1], seeds)), needed], values)


def _worst(name: str, widths: Sequence[int], counts: Sequence[int], seeds: int) -> float:
    """The largest factor between simulation and theory, Gaussian keys, from 64 pairs on."""
    kernel = SIMILARITIES[name]
    ratios = [
        _median(kernel, "gaussian", width, pairs, seeds)[0] / kernel.inverse(width, pairs)
        for width in widths
        for pairs in counts
        if pairs >= 64 and kernel.inverse
    ]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def _rows(widths: Sequence[int], pairs: int, seeds: int) -> list[Row]:
    rows = []
    for name, kernel in SIMILARITIES.items():
        for width in widths:
            theory = kernel.inverse(width, pairs) if kernel.inverse else None
            row = {"kernel": name, "d": width, "theory": "" if theory is None else float(f"{theory:.3g}")}
            found = {keys: _median(kernel, keys, width, pairs, seeds)[0] for keys in KEYS}
            rows.append({**row, **{keys: float(f"{value:.3g}") for keys, value in found.items()}})
    return rows


def _needed(counts: Sequence[int]) -> list[Row]:
    """Measured and predicted widths; linear memories are measured on a grid of ratio 2^(1/4)."""
    rows = []
    for pairs in counts:
        grid = sorted({round(2 ** (e / 4)) for e in range(4, 4 * round(math.log2(pairs)) + 5)})
        row: dict = {"N": pairs}
        for name in ("linear", "relu", "exp, tau = sqrt d"):
            row[name] = width_needed(SIMILARITIES[name], pairs, grid, 3)
        row["theory linear"], row["theory relu"] = pairs, pairs / 2
        row["theory exp"] = round(((math.log(pairs) + 2) / 2) ** 2, 1)
        rows.append(row)
    return rows


def _growth(result: Result) -> tuple[float, float]:
    """(exponent of the linear memory's width in N, growth of the root of exp's width per unit of ln N)."""
    rows = result.rows(1)
    logs = np.log([row["N"] for row in rows])
    linear = np.polyfit(logs, np.log([row["linear"] for row in rows]), 1)[0]
    root = np.polyfit(logs, np.sqrt([row["exp, tau = sqrt d"] for row in rows]), 1)[0]
    return float(linear), float(root)


def _judge(result: Result) -> Verdict:
    worst, (linear, root) = result.values["worst factor to theory"], _growth(result)
    near = max(worst["linear"], worst["relu"]) < 1.3 and worst["exp, tau = sqrt d"] < 2
    return Verdict(
        grade(near, abs(linear - 1) < 0.1 and abs(root - 0.5) < 0.1),
        f"From N = 64 on linear and relu are within factors of {worst['linear']:.2f} and {worst['relu']:.2f} of "
        f"theory, exp within {worst['exp, tau = sqrt d']:.2g}; the width for SNR 1 grows as N^{linear:.2f}, its root "
        f"for exp by {root:.2f} per unit of ln N (theory 0.50).",
    )


def _with_theory(result: Result) -> Result:
    """The rows of the main table, and theory as two more kernels."""
    names = {"linear": "theory, linear", "exp, tau = sqrt d": "theory, exp"}
    rows = [row for row in result.rows() if row["kernel"] in names]
    theory = [{**row, "kernel": names[row["kernel"]], "gaussian": row["theory"]} for row in rows]
    return Result([Table("", [*result.rows(), *theory])])


FIGURE = Lines(
    line="kernel",
    points="d",
    value="gaussian",
    x="key width d",
    y="1 / SNR",
    width=6.5,
    options={
        "styles": {"theory, linear": DOTTED, "theory, exp": {**DOTTED, "linestyle": "-."}},
        "x_base": 2,
        "y_scale": "log",
    },
)
SNR = Study(
    name="snr",
    title="Signal to noise, simulated",
    claim="With i.i.d. Gaussian keys 1/SNR is N/d for a linear memory, N/2d for relu and N exp(2 - 2 sqrt d) for exp "
    "at tau = sqrt d, so a linear memory needs a width linear in N and exp one of log^2 N.",
    source="arXiv 2505.19488, section 2",
    measure=_measure,
    judge=_judge,
    draw=lambda result: FIGURE(_with_theory(result)),
    caption="Noise over signal of 16384 pairs by key width, Gaussian keys. The table has the width at which both are "
    "equal.",
    settings={
        "widths": (16, 32, 64, 128, 256),
        "pairs": tuple(2**e for e in range(4, 15)),
        "needed": tuple(2**e for e in range(5, 12)),
        "seeds": 8,
    },
    quick=Quick(settings={"widths": (16, 64), "pairs": (64, 512), "needed": (64, 512), "seeds": 3}),
    summary=lambda result: result.rows(1),
)
