"""Reach of a memory between segments: exact match of one question against the number of pairs before it.

The second table shows what the memory of each layer holds. A write moves what is read at its key towards the new value
by the fraction beta / (z . phi), so a layer to which training gave a small beta approaches its values over 1 / beta
writes. What it adds to the tokens is small within the pairs of training and grows beyond them, unless weight decay
keeps it small: rewrite is exact with it, in every layer (configs/rewrite.py).

The third table shows how many distinct keys a memory can hold, whatever was trained: keys are drawn at random, so that
their features overlap by chance only. Keys of width 32, those of configs/remember.py, hold half of 500 pairs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.plots import Lines, line_style
from memformer.lab.runs import longest_trained
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent, spread
from memformer.ops.associative import NEIGHBOURS, AssociativeMemory, associative_read, associative_write, dpfp
from memformer.tasks import Remember
from memformer.tasks.segment_recall import QUERY
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.input import make_loader

__all__ = ["SEGMENT_RECALL", "run_name"]

# Sequences, and questions to each after each number of pairs.
ROWS, QUESTIONS = 128, 4
# Stated before the runs, for the greatest number of pairs: exact (mean of the seeds), and not (best seed).
EXACT, FAILS = 0.999, 0.5
TITLE = "Exact match of one question (test split), by the pairs before it; of the seeds at the last length of training"
RANDOM = "Without a model: distinct random keys, each written once, of which the value is read (the best beta of three)"
NAMES = ("ARMT", "ARMT without gamma", "RMT")


def run_name(config: Row) -> str:
    """The display name of the model of a run's config.

    Example:
      >>> run_name({"model": {"type": "armt", "correction": True}})
      'ARMT'
    """
    model = config["model"]
    with_gamma, without, tokens = NAMES
    return tokens if model["type"] == "rmt" else with_gamma if model["correction"] else without


def _measure(runs: Runs, settings: Settings) -> Result:
    """Asks each run of configs/remember.py or configs/rewrite.py one question after 2 to 500 pairs."""
    groups: dict[tuple[str, str], list[LoadedRun]] = {}
    for run in runs.values():
        groups.setdefault((_task_of(run).name, run_name(run.config)), []).append(run)
    rows, layers, values = [], [], {}
    for (task, name), group in groups.items():
        # how far a memory reaches beyond its training is a question to those that were trained
        reached = [run for run in group if longest_trained(run) >= run.task.length]
        readers = [_Reader(run) for run in reached or group]
        asked = [reader.ask() for reader in readers]
        exact = [{n: share for n, (share, _) in one.items()} for one in asked]
        row = {"task": task, "model": name, "seeds at the last length": f"{len(reached)} of {len(group)}"}
        rows.append(row | {f"{n} pairs": spread([one[n] for one in exact]) for n in exact[0]})
        values[f"{task} {name}"] = {str(n): [round(one[n], 4) for one in exact] for n in exact[0]}
        layers += [{"task": task, "model": name} | row for row in _layer_rows(readers, asked)]
    tables = [Table(TITLE, rows)]
    if layers:
        tables.append(Table("Memory of each layer: norm of its matrix A, and exact match if it stays empty", layers))
    tables.append(Table(RANDOM, _random_rows()))
    return Result(tables, values)


def _task_of(run: LoadedRun) -> Remember:
    if not isinstance(run.task, Remember):
        raise RunError(f"segment_recall measures runs of remember and rewrite, got {run.folder} of {run.task.name}.")
    return dataclasses.replace(run.task, queries=1)


class _Reader:
    """Asks a run's model questions, with one compiled program for any number of pairs.

    Args:
      run: a run of remember or rewrite.
    """

    def __init__(self, run: LoadedRun):
        self.task, self._run = _task_of(run), run
        self.depth = run.config["model"]["depth"] if run.config["model"]["type"] == "armt" else 0

        # one segment per call, with the state of the last
        @jax.jit
        def read(params: Any, rest: Any, state: Any, inputs: Any, kept: Any) -> Any:
            output = run.model.module(params, rest, jax.random.key(0))(inputs, state=state)
            memory = output.state["memory"]
            if self.depth:
                memory = tuple(dataclasses.replace(m, matrix=m.matrix * kept[i]) for i, m in enumerate(memory))
            return output.logits, output.state | {"memory": memory}

        self._read = read

    def ask(self, empty: int | None = None) -> dict[int, tuple[float, list[float]]]:
        """By the number of pairs: the share of exact answers, and the mean norm of each layer's matrix.

        Args:
          empty: the layer whose memory stays empty, or None.
        """
        task, run, found = self.task, self._run, {}
        most = max(task.eval_lengths)
        loader = make_loader(task.with_length(most), "test", batch_size=ROWS, seed=run.config["seed"])
        segments = np.asarray(next(loader)["inputs"]).reshape(ROWS, -1, task.segment_length)
        loader.close()
        kept = jnp.asarray(np.arange(self.depth) != empty, jnp.float32)
        module: Any = run.module()
        rng, state = np.random.default_rng(run.config["seed"]), module.init_state(ROWS)
        for pairs in range(1, most + 1):
            _, state = self._read(*run.weights, state, segments[:, pairs - 1], kept)
            if pairs in task.eval_lengths:
                # the state after a question is dropped
                right = [self._answer(state, _question(rng, segments[:, :pairs], task), kept) for _ in range(QUESTIONS)]
                matrices = [memory.matrix for memory in state["memory"]] if self.depth else []
                norms = [float(jnp.mean(jnp.linalg.norm(matrix, axis=(1, 2)))) for matrix in matrices]
                found[pairs] = (float(np.mean(right)), norms)
        return found

    def _answer(self, state: Any, question: np.ndarray, kept: Any) -> float:
        logits, _ = self._read(*self._run.weights, state, question, kept)
        answer = slice(self.task.key_size, -2)
        told = np.asarray(logits)[:, answer].argmax(axis=-1)
        return float(np.mean(np.all(told == question[:, self.task.key_size + 1 : -1], axis=1)))


def _question(rng: np.random.Generator, segments: np.ndarray, task: Remember) -> np.ndarray:
    """A question for one of the keys written in each row, with the latest value: `key 101 value 102`."""
    asked = np.empty((len(segments), task.segment_length), segments.dtype)
    for row, written in enumerate(segments):
        latest = {tuple(segment[: task.key_size]): segment for segment in written}
        asked[row] = list(latest.values())[rng.integers(len(latest))]
    asked[:, task.key_size] = QUERY
    return asked


def _layer_rows(readers: Sequence[_Reader], asked: Sequence[Mapping[int, tuple[float, list[float]]]]) -> list[Row]:
    """A row per layer: what it holds at the length of training and at most, and the answers without it."""
    rows = []
    lengths = readers[0].task.eval_lengths
    few, most = max(n for n in lengths if n <= readers[0].task.length), max(lengths)
    for layer in range(readers[0].depth):
        row: Row = {"layer": layer + 1}
        row |= {f"norm, {n} pairs": f"{np.mean([one[n][1][layer] for one in asked]):.3g}" for n in (few, most)}
        without = [reader.ask(empty=layer) for reader in readers]
        rows.append(row | {f"if empty, {n} pairs": spread([one[n][0] for one in without]) for n in (few, most)})
    return rows


# Of the third table: widths of keys, numbers of pairs, write strengths; sequences, and values to tell apart.
WIDTHS, PAIRS, BETAS = (32, 64, 128, 256), (50, 100, 200, 500), (0.25, 0.5, 1.0)
SEQUENCES, VALUES = 8, 16


def _random_rows() -> list[Row]:
    rows = []
    for width in WIDTHS:
        shares = np.max([_read_random(width, beta) for beta in BETAS], axis=0)
        row: Row = {"key width": width, "features": 2 * NEIGHBOURS * width}
        rows.append(row | {f"{n} pairs": percent(float(share)) for n, share in zip(PAIRS, shares, strict=True)})
    return rows


@partial(jax.jit, static_argnums=0)
def _read_random(width: int, beta: Any) -> Any:
    """The share of values read as written, after each number of pairs."""
    keys, values = jax.random.split(jax.random.key(0))
    phi = dpfp(jax.random.normal(keys, (max(PAIRS), SEQUENCES, 1, width)))
    written = jax.random.randint(values, phi.shape[:3], 0, VALUES)

    def write(memory: AssociativeMemory, pair: tuple) -> tuple[AssociativeMemory, None]:
        phi, value = pair
        return associative_write(memory, phi, jax.nn.one_hot(value, VALUES), jnp.full(phi.shape[:2], beta)), None

    shape, shares = (SEQUENCES, phi.shape[-1]), []
    memory = AssociativeMemory(jnp.zeros((*shape, VALUES)), jnp.zeros(shape))
    for start, stop in pairwise((0, *PAIRS)):
        memory, _ = jax.lax.scan(write, memory, (phi[start:stop], written[start:stop]))
        read = associative_read(memory, jnp.swapaxes(phi[:stop, :, 0], 0, 1))
        shares.append(jnp.mean(jnp.argmax(read, axis=-1) == written[:stop, :, 0].T))
    return jnp.stack(shares)


def _judge(result: Result) -> Verdict:
    most = str(max(int(n) for scores in result.values.values() for n in scores))
    tasks: dict[str, dict[str, list[float]]] = {}
    for label, scores in result.values.items():
        task, _, name = label.partition(" ")
        tasks.setdefault(task, {})[name] = scores.get(most, [0.0])
    exact = [bool(np.mean(found[NAMES[0]]) >= EXACT) for found in tasks.values() if NAMES[0] in found]
    lost = [max(found[name]) < FAILS for found in tasks.values() for name in NAMES[1:] if name in found]
    scores = "; ".join(
        f"{task} " + ", ".join(f"{name} {spread(values)}" for name, values in found.items())
        for task, found in tasks.items()
    )
    return Verdict(
        grade(*exact, *lost),
        f"Exact match after {most} pairs: {scores}. Needed: ARMT {percent(EXACT)} in the mean of the seeds, without "
        f"gamma and by memory tokens alone the best seed below {percent(FAILS, 0)}.",
    )


SEGMENT_RECALL = Study(
    name="segment_recall",
    title="Memory between segments",
    claim="Trained on up to 50 pairs, ARMT answers exactly after 500; without the gamma correction it does not "
    "generalise beyond its training, and memory tokens alone (RMT) hold less.",
    source="arXiv 2407.04841",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="{} pairs",
        panel="task",
        x="pairs before the question",
        y="exact match",
        limits=(0, 1.04),
        options={"x_base": 10, "styles": {name: line_style(n) for n, name in enumerate(NAMES)}},
    ),
    caption="Exact match of one question by the number of pairs before it, test split; trained on up to 50 pairs; "
    "lines: mean of the seeds that reached 50, bands: least to greatest. RMT stayed at 2 pairs for all its 2000 "
    "steps on rewrite. Rows of remember are of 21 November.",
    reads="configs/remember.py and configs/rewrite.py",
)
