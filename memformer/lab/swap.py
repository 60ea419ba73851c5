"""Following swaps (DeltaFormer, NeurIPS 2025, figures 3, 4 and 6): kernels, depth, curriculum, stability.

Five objects, a swap at each step, and the label is the object now at place 0 (five tokens of start come first). `swap`
asks which kernel kappa1 may write, whether more layers of softmax attention do as well, and how far u in float32 is
from u in float64 as the sequence grows. `curriculum` asks whether climbing from 32 to 256 swaps helps, with rotary
positions and without, and how steady training is: spikes of the loss, norms of gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.numerics import l2norm
from memformer.core.types import Array
from memformer.lab.runs import accuracies, accuracy_by_length, run_rows, train_runs
from memformer.lab.study import Study, learning_curve, new_figure, training_records
from memformer.ops.deltaformer import deltaformer
from memformer.training.evaluation import LoadedRun
from memformer.training.input import make_loader
from memformer.training.plots import COLOURS

__all__ = ["KERNELS", "error_of_u", "measure", "measure_curriculum", "spikes"]

KERNELS: dict[str, Mapping[str, Any]] = {
    "linear": {"name": "linear"},
    "round": {"name": "round", "decimals": 2},
    "relu": {"name": "relu"},
    "softmax": {"name": "softmax"},
    "exp": {"name": "exp"},
}
DEPTHS = (1, 2, 3, 4, 5, 6)
SHORT, LONG = 32, 256
LENGTHS = (32, 64, 128, 256)
BASE: Mapping[str, Any] = {
    "task": {"name": "swap", "objects": 5, "length": SHORT},
    "model": {"memory": "deltaformer", "width": 64, "heads": 4, "feedforward": None},
    "optimizer": {"learning_rate": 5e-3, "schedule": "constant", "warmup_steps": 20},
    "train": {"steps": 400, "batch_size": 64, "stop_accuracy": 0.999, "final_lengths": LENGTHS, "final_batches": 2},
    "train.on_nan": "skip",
}
SMALLER: Mapping[str, Any] = {
    "task.objects": 3,
    "task.length": 8,
    "model.width": 32,
    "model.heads": 2,
    "train.steps": 80,
    "train.batch_size": 32,
    "train.final_lengths": (16,),
}
LONG_BASE: Mapping[str, Any] = {"train.batch_size": 32, "train.steps": 400, "train.stop_accuracy": 0.99}
KERNELS_CLAIM = (
    "One layer of DeltaFormer that writes through the linear or the round kernel follows swaps exactly, softmax as "
    "kappa1 does worse, and more layers of softmax attention do not help (DeltaFormer, figures 3 and 4)."
)
CURRICULUM_CLAIM = (
    "At 256 swaps one layer learns very slowly; by a curriculum from 32 it learns; with rotary positions it learns "
    "sooner, without them it goes further (DeltaFormer, figure 6)."
)


def measure(study: Study, *, quick: bool = False) -> None:
    """Trains one layer for each kappa1, and softmax attention of 1 to 6 layers, at 32 swaps.

    Args:
      study: takes what comes out.
      quick: three objects, short sequences, two kernels.
    """
    kernels, depths = (("linear", "softmax"), ()) if quick else (tuple(KERNELS), DEPTHS)
    table = {f"kernel {name}": _deltaformer(KERNELS[name]) for name in kernels}
    table |= {
        f"softmax depth {depth}": {
            "model": {"memory": "softmax_attention", "depth": depth, "scan_layers": True, "feedforward": "swiglu"},
            "optimizer.learning_rate": 2e-3,
        }
        for depth in depths
    }
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=SMALLER)
    study.claim = KERNELS_CLAIM
    _tabulate(runs, study)
    lengths = (8, 16) if quick else LENGTHS
    errors = {label: error_of_u(run, lengths) for label, run in runs.items() if label.startswith("kernel")}
    study.add_table(
        "Largest error of u in float32 against float64, over the root mean square of u (trained models)",
        [{"run": label} | {f"{n} swaps": f"{x:.1e}" for n, x in found.items()} for label, found in errors.items()],
    )
    study.add_table("What was trained", run_rows(runs))
    worst = {label: max(found.values()) for label, found in errors.items()}
    most = max(worst, key=lambda label: worst[label])
    trained = next(iter(runs.values())).task.length
    told = ", ".join(f"{label} {accuracy_by_length(run)[trained]:.0%}" for label, run in runs.items())
    chance = next(iter(runs.values())).task.chance
    far = f"u is off by at most {worst[most]:.0e} of its size at up to {max(lengths)} swaps ({most})"
    study.outcome = f"At {trained} swaps (guess {chance:.0%}): {told}; {far}."
    groups = {"one layer of DeltaFormer, by kappa1": "kernel ", "softmax attention": "softmax "}
    _draw({title: start for title, start in groups.items() if any(n.startswith(start) for n in runs)}, runs, study)


def measure_curriculum(study: Study, *, quick: bool = False) -> None:
    """Trains one layer at 256 swaps, directly and climbing from 32, with rotary positions and without.

    Args:
      study: takes what comes out.
      quick: three objects, from 8 swaps to 16, without rotary positions.
    """
    start, stop = (8, 16) if quick else (SHORT, LONG)
    table = {}
    for positions in ("plain",) if quick else ("plain", "rotary"):
        row = {**_deltaformer(KERNELS["linear"], rotary=positions == "rotary"), **LONG_BASE, "task.length": stop}
        climb = {"enabled": True, "start": start, "stop": stop, "factor": 2, "accuracy": 0.99}
        table[f"{positions} by curriculum"] = {**row, "train.curriculum": climb}
        table[f"{positions} directly"] = row
    smaller = {**SMALLER, "task.length": stop}
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=smaller)
    study.claim = CURRICULUM_CLAIM
    _tabulate(runs, study)
    steady = [_steadiness(label, run) for label, run in runs.items()]
    study.add_table("How steady training is: a spike is a record whose loss is twice the least before it", steady)
    study.add_table("What was trained", run_rows(runs))
    told = []
    for label, run in runs.items():
        longest = max(record["length"] for record in training_records(run))
        told.append(f"{label} {accuracy_by_length(run)[stop]:.0%} after {run.step} steps (trained to {longest})")
    study.outcome = f"At {stop} swaps: {', '.join(told)}."
    _draw({f"{stop} swaps": ""}, runs, study)


def _tabulate(runs: Mapping[str, LoadedRun], study: Study) -> None:
    study.add_table("Accuracy by the number of swaps (test split)", [_row(label, run) for label, run in runs.items()])
    study.values = accuracies(runs)


def _deltaformer(kernel: Mapping[str, Any], *, rotary: bool = False) -> dict[str, Any]:
    options = {"write_kernel": dict(kernel), "read_kernel": "softmax", "rotary": rotary}
    return {"model.memory_options": {"deltaformer": {**options, "unit_keys": True, "beta_limit": 2.0}}}


def _row(label: str, run: LoadedRun) -> dict[str, Any]:
    scores = accuracy_by_length(run)
    records = training_records(run)
    reached = next((record["step"] for record in records if (record["accuracy"] or 0) >= 0.99), None)
    longest = max(record["length"] for record in records)
    shown = {f"{n} swaps": f"{100 * x:.1f}%" for n, x in scores.items()}
    return {"run": label, "first at 99%": "never" if reached is None else f"step {reached}", "came to": longest} | shown


def spikes(losses: Sequence[float]) -> int:
    """How many values are more than twice the least before them, one for each excursion.

    Example:
      >>> spikes([1.0, 0.5, 1.2, 1.3, 0.4, 0.3])
      1
    """
    count, least, above = 0, float("inf"), False
    for loss in losses:
        now = loss > 2 * least
        count += now and not above
        least, above = min(least, loss), now
    return count


def _steadiness(label: str, run: LoadedRun) -> dict[str, Any]:
    records = training_records(run)
    finite = [record for record in records if record["loss"] is not None]
    norms = [record["gradient_norm"] for record in records if record["gradient_norm"] is not None]
    # a longer sequence is a harder task: its first loss is no spike
    by_length = {n: [r["loss"] for r in finite if r["length"] == n] for n in {r["length"] for r in finite}}
    return {
        "run": label,
        "spikes": sum(spikes(losses) for losses in by_length.values()),
        "skipped steps": sum(record.get("skipped_steps", 0) for record in records),
        "gradient norm, median": round(float(np.median(norms)), 3),
        "largest": round(float(np.max(norms)), 3),
        "least loss": round(min(record["loss"] for record in finite), 4),
    }


def error_of_u(run: LoadedRun, lengths: Sequence[int], batch: int = 4) -> dict[int, float]:
    """How far rounding moves u: keys, values and beta of a trained layer, solved in float32 and in float64.

    Args:
      run: of one layer of DeltaFormer that writes with w = k, without rotary positions.
      lengths: of sequences.
      batch: sequences.

    Returns:
      Largest |u - u64| over the root mean square of u64, by length.
    """
    model: Any = run.module()
    block = model.blocks[0]
    memory, sizes = block.memory, {n: run.task.with_length(n).steps for n in lengths}
    loader = make_loader(run.task.with_length(max(lengths)), "test", batch_size=batch, seed=0)
    tokens = jnp.asarray(next(loader)["inputs"])
    loader.close()
    x = block.norm(model.embedding(tokens))
    heads = (*tokens.shape, memory.heads, -1)
    k, v = (memory.projections[name](x).reshape(heads) for name in ("key", "value"))
    arrays = [np.asarray(a) for a in (l2norm(k), v, memory.beta(x))]
    short = _solve(arrays, memory.write_kernel, jnp.float32)
    with jax.enable_x64(True):
        long = _solve(arrays, memory.write_kernel, jnp.float64)
    # what comes later does not change u: a shorter sequence is the beginning of the longest
    return {
        n: float(np.abs(short - long)[:, :steps].max() / np.sqrt(np.mean(long[:, :steps] ** 2)))
        for n, steps in sizes.items()
    }


def _solve(arrays: Sequence[np.ndarray], kernel: Any, dtype: Any) -> np.ndarray:
    @jax.jit
    def solve(k: Array, v: Array, beta: Array) -> Array:
        return deltaformer(k, k, v, beta=beta, write_kernel=kernel, read_kernel="linear")[1].u

    return np.asarray(solve(*(jnp.asarray(a, dtype) for a in arrays)))


def _draw(groups: Mapping[str, str], runs: Mapping[str, LoadedRun], study: Study) -> None:
    """A panel for each group of runs: its title, and what their labels start with."""
    figure, axes = new_figure(1, len(groups), width=4.2 * max(len(groups), 1.5), height=3.9)
    for axis, (title, start) in zip(axes[0], groups.items(), strict=True):
        chosen = {label.removeprefix(start): run for label, run in runs.items() if label.startswith(start)}
        for index, (name, run) in enumerate(chosen.items()):
            line = "-" if index % 2 == 0 else "--"
            axis.plot(*learning_curve(run), line, color=COLOURS[index], label=name, linewidth=1.5)
        axis.axhline(next(iter(chosen.values())).task.chance, color="0.4", linestyle=":", label="guess")
        axis.set_ylim(0, 1.03)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training step")
        axis.legend(frameon=False, fontsize=8, loc="best")
    axes[0, 0].set_ylabel("accuracy in training")
    caption = f"Accuracy in training; by curriculum, at the length that the run has come to. Claim: {study.claim}"
    study.save_figure(figure, "learning", caption)
