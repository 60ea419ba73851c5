"""Who can tell which nodes of a graph are connected with the first one (DeltaFormer, NeurIPS 2025, figure 5).

A token is a row of the adjacency matrix of two trees; a node is reached where its parent, an earlier token, is. One
layer of DeltaFormer writes at each node what it has read at its neighbours, so that a chain of any length is followed
in one pass; each layer of softmax attention takes one more step along it. The row of a node does not say which of its
neighbours it is itself: where w = k a node finds its siblings as well as its parent, so the write has a query w of its
own, as wide as the model.
"""

from collections.abc import Mapping
from typing import Any

from memformer.lab.runs import accuracy_by_length, run_rows, train_runs
from memformer.lab.study import Study, learning_curve, new_figure
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["measure"]

DEPTHS = (1, 2, 4)
# A write query of its own and one head; and what the layer has by default.
OWN_QUERY = {"write_kernel": "linear", "unit_keys": True, "beta_limit": 2.0, "write_query": True}
DELTAFORMER: Mapping[str, Any] = {"model.memory": "deltaformer", "model.depth": 1}
BASE: Mapping[str, Any] = {
    "task": {"name": "reachability", "length": 32, "width": 64},
    "model": {"width": 64, "heads": 4, "feedforward": "swiglu", "scan_layers": True},
    "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50},
    "train": {"steps": 800, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 8, "log_every": 25},
}
CLAIM = (
    "One layer of DeltaFormer tells nearly without fault which nodes are connected with the first, several layers of "
    "softmax attention do not (DeltaFormer, figure 5)."
)


def measure(study: Study, *, quick: bool = False) -> None:
    """Trains one layer of DeltaFormer, of two kinds, and 1, 2 and 4 layers of softmax attention on graphs of 32 nodes.

    Args:
      study: takes what comes out.
      quick: graphs of 8 nodes, DeltaFormer alone.
    """
    one = {"model.heads": 1, "model.memory_options": {"deltaformer": OWN_QUERY}}
    table: dict[str, dict[str, Any]] = {"DeltaFormer, 1 layer": {**DELTAFORMER, **one}}
    if not quick:
        softmax = {n: {"model.memory": "softmax_attention", "model.depth": n} for n in DEPTHS}
        table["DeltaFormer, 1 layer, w = k, 4 heads"] = {**DELTAFORMER}
        table |= {f"softmax, {n} layer{'s' * (n > 1)}": changes for n, changes in softmax.items()}
        table[f"softmax, {DEPTHS[-1]} layers, 1 head"] = {**softmax[DEPTHS[-1]], "model.heads": 1}
    smaller = {"task.length": 8, "task.width": 12, "model.width": 32, "train.steps": 120}
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=smaller)
    study.claim = CLAIM
    rows = [_row(label, run) for label, run in runs.items()]
    study.add_table("Nodes told rightly, and graphs without a mistake (test split)", rows)
    study.add_table("What was trained", run_rows(runs))
    study.values = {label: accuracy_by_length(run) for label, run in runs.items()}
    nodes = next(iter(runs.values())).task.length
    told = [f"{row['run']} {row['nodes']} of nodes, {row['graphs']} of graphs" for row in rows]
    study.outcome = f"Graphs of {nodes} nodes: {'; '.join(told)}."
    _draw(runs, study)


def _row(label: str, run: LoadedRun) -> dict[str, Any]:
    nodes, graphs = (accuracy_by_length(run, score)[run.task.length] for score in ("accuracy", "sequence_accuracy"))
    return {"run": label, "nodes": f"{100 * nodes:.1f}%", "graphs": f"{100 * graphs:.1f}%", "steps": run.step}


def _draw(runs: Mapping[str, LoadedRun], study: Study) -> None:
    figure, axes = new_figure()
    for colour, (label, run) in zip(COLOURS, runs.items(), strict=False):
        line = "-" if label.startswith("Delta") else "--"
        axes[0, 0].plot(*learning_curve(run), line, color=colour, label=label)
    axes[0, 0].axhline(0.5, color="0.4", linestyle=":", label="guess")
    axes[0, 0].set_ylim(0.45, 1.02)
    axes[0, 0].set_xlabel("training step")
    axes[0, 0].set_ylabel("nodes told rightly, in training")
    figure.legend(loc="outside right center", frameon=False)
    study.save_figure(figure, "learning", f"Nodes told rightly in training. Claim: {CLAIM}")
