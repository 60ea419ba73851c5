"""Retrieval signal-to-noise: how loudly a memory of N pairs answers with the right value.

A memory holds sum_j kappa(k_j, .) v_j. Asked with a stored key k_i it gives c v_i + r, where c = kappa(k_i, k_i)
and r is what the other keys answer. For i.i.d. keys N(0, I_d), arXiv 2505.19488 section 2 derives 1 / SNR =
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
from memformer.lab.study import Study, legend_below, new_figure
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["KEYS", "SIMILARITIES", "Similarity", "inverse_snr", "measure", "width_needed"]

# Keys asked for in one simulation, and width of the values.
QUERIES, VALUES = 32, 32

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A similarity kernel or feature map with what theory says of it.

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
            # one factor for the whole row leaves the ratio of signal to noise as it is
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
      kernel: what is measured.
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


def measure(study: Study, *, quick: bool) -> None:
    """Simulates every kernel over widths, numbers of pairs and kinds of keys."""
    widths = (16, 64) if quick else (16, 32, 64, 128, 256)
    counts = (64, 512) if quick else tuple(2**e for e in range(4, 15))
    seeds = 3 if quick else 8
    study.claim = (
        "With i.i.d. Gaussian keys 1/SNR is N/d for a linear memory, N/2d for relu and N exp(2 - 2 sqrt d) for exp at "
        "tau = sqrt d (2505.19488, section 2), so a linear memory needs a width linear in N and exp one of log^2 N."
    )
    curves = {}
    for keys in KEYS:
        for name, kernel in SIMILARITIES.items():
            for width in widths:
                curves[keys, name, width] = [_median(kernel, keys, width, pairs, seeds) for pairs in counts]
        say(f"{keys} keys: done")
    at = counts[-1]
    rows = _rows(curves, widths, counts)
    study.add_table(f"1 / SNR with N = {at} pairs (median over queries and {seeds} seeds)", rows)
    needed = _needed(counts, seeds, quick)
    study.add_table("Width at which SNR is 1, Gaussian keys", needed)
    _draw(study, curves, widths, counts)
    _draw_needed(study, needed)
    study.outcome = _outcome(curves, widths, counts, needed)
    study.values = {"widths": widths, "pairs": counts, "seeds": seeds}


def _rows(curves: dict, widths: Sequence[int], counts: Sequence[int]) -> list[dict]:
    rows = []
    for name, kernel in SIMILARITIES.items():
        for width in widths:
            theory = kernel.inverse(width, counts[-1]) if kernel.inverse else None
            row = {"kernel": name, "d": width, "theory": "" if theory is None else float(f"{theory:.3g}")}
            rows.append({**row, **{keys: float(f"{curves[keys, name, width][-1][0]:.3g}") for keys in KEYS}})
    return rows


def _needed(counts: Sequence[int], seeds: int, quick: bool) -> list[dict]:
    """Measured and predicted widths; linear memories are measured on a grid of ratio 2^(1/4)."""
    rows = []
    for pairs in counts if quick else counts[1:-3]:
        grid = sorted({round(2 ** (e / 4)) for e in range(4, 4 * round(math.log2(pairs)) + 5)})
        row: dict = {"N": pairs}
        for name in ("linear", "relu", "exp, tau = sqrt d"):
            row[name] = width_needed(SIMILARITIES[name], pairs, grid, 3)
        row["theory linear"], row["theory relu"] = pairs, pairs / 2
        row["theory exp"] = round(((math.log(pairs) + 2) / 2) ** 2, 1)
        rows.append(row)
    return rows


def _outcome(curves: dict, widths: Sequence[int], counts: Sequence[int], needed: list[dict]) -> str:
    def worst(name: str) -> float:
        """The largest factor between measurement and theory."""
        ratios = [
            median / inverse(width, pairs)
            for width in widths
            for pairs, (median, _, _) in zip(counts, curves["gaussian", name, width], strict=True)
            if pairs >= 64 and (inverse := SIMILARITIES[name].inverse)
        ]
        return max(max(ratio, 1 / ratio) for ratio in ratios)

    logs = np.log([row["N"] for row in needed])
    slope = np.polyfit(logs, np.log([row["linear"] for row in needed]), 1)[0]
    root_slope = np.polyfit(logs, np.sqrt([row["exp, tau = sqrt d"] for row in needed]), 1)[0]
    return (
        f"From N = 64 on, linear and relu stay within factors of {worst('linear'):.2f} and {worst('relu'):.2f} of "
        f"theory, exp at tau = sqrt d within {worst('exp, tau = sqrt d'):.2g} (a median of heavy tails). The width for "
        f"SNR 1 grows as N^{slope:.2f} for linear; for exp its root grows by {root_slope:.2f} for each unit of ln N "
        "(theory 0.50)."
    )


def _draw(study: Study, curves: dict, widths: Sequence[int], counts: Sequence[int]) -> None:
    width = 64
    figure, axes = new_figure(1, len(KEYS), width=10.0, height=3.8)
    for axis, keys in zip(axes[0], KEYS, strict=True):
        for index, (name, kernel) in enumerate(SIMILARITIES.items()):
            # six colours; the seventh and eighth kernel are told by their dashes
            colour, dash = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
            middle, low, high = np.array(curves[keys, name, width]).T
            axis.plot(counts, middle, dash, color=colour, label=name, linewidth=1.5)
            axis.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
            if keys == "gaussian" and kernel.inverse and dash == "-":
                points = [kernel.inverse(width, pairs) for pairs in counts]
                axis.plot(counts, points, ".", color=colour, markersize=5)
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(1e-7, 1e6)
        axis.set_xlabel("pairs stored, N")
        axis.set_title(f"{keys} keys")
    axes[0, 0].set_ylabel("1 / SNR (noise over signal)")
    legend_below(figure, axes[0, 0], columns=4)
    study.save_figure(
        figure,
        "pairs",
        f"Noise over signal against the number of pairs at width {width}; dots are theory for Gaussian keys, bands the "
        "10% to 90% of seeds. Claim: kernels differ by a constant in slope but exponentially in level, and unit or "
        "correlated keys leave the theory.",
    )


def _draw_needed(study: Study, needed: list[dict]) -> None:
    figure, axes = new_figure()
    axis = axes[0, 0]
    pairs = [row["N"] for row in needed]
    for colour, name, theory in zip(
        COLOURS, ("linear", "relu", "exp, tau = sqrt d"), ("theory linear", "theory relu", "theory exp"), strict=False
    ):
        axis.plot(pairs, [row[name] or math.nan for row in needed], "o-", color=colour, label=name, markersize=4)
        axis.plot(pairs, [row[theory] for row in needed], ":", color=colour)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("pairs stored, N")
    axis.set_ylabel("width d at which SNR is 1")
    axis.legend(frameon=False)
    study.save_figure(
        figure,
        "width",
        "Key width at which signal and noise are equal, Gaussian keys; dotted is theory. Claim: linear in N for linear "
        "and relu, log^2 N for exp.",
    )
