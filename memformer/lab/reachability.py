"""Reachability in a graph (DeltaFormer, NeurIPS 2025, figure 5).

A token is a row of the adjacency matrix of two trees; a node is reached where its parent, an earlier token, is. One
layer of DeltaFormer writes at each node what it has read at its neighbours, so that one pass follows a chain of any
length; each layer of softmax attention takes one more step along it. The row of a node does not mark the node itself:
where w = k a node finds its siblings as well as its parent, so the write has a query w of its own, as wide as the
model.
"""

from collections.abc import Mapping
from typing import Any

from memformer.lab.plots import Bars
from memformer.lab.runs import accuracy_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent

__all__ = ["REACHABILITY"]

OWN_QUERY = {"write_kernel": "linear", "unit_keys": True, "beta_limit": 2.0, "write_query": True}
DELTAFORMER: Row = {"model.memory": "deltaformer", "model.depth": 1}
ROWS: Mapping[str, Row] = {
    "DeltaFormer, 1 layer": {
        **DELTAFORMER,
        "model.heads": 1,
        "model.memory_options": {"deltaformer": OWN_QUERY},
    },
    "DeltaFormer, 1 layer, w = k, 4 heads": {**DELTAFORMER},
    "softmax, 1 layer": {"model.memory": "softmax_attention", "model.depth": 1},
    "softmax, 2 layers": {"model.memory": "softmax_attention", "model.depth": 2},
    "softmax, 4 layers": {"model.memory": "softmax_attention", "model.depth": 4},
    "softmax, 4 layers, 1 head": {"model.memory": "softmax_attention", "model.depth": 4, "model.heads": 1},
}


def _measure(runs: Runs, settings: Settings) -> Result:
    rows = [_row(label, run) for label, run in runs.items()]
    title = "Node accuracy, and share of graphs without an error (test split)"
    values = {label: accuracy_by_length(run) for label, run in runs.items()}
    return Result([Table(title, rows)], values)


def _row(label: str, run: Any) -> Row:
    nodes, graphs = (accuracy_by_length(run, score)[run.task.length] for score in ("accuracy", "sequence_accuracy"))
    return {"run": label, "node accuracy": percent(nodes), "graph accuracy": percent(graphs), "steps": run.step}


def _judge(result: Result) -> Verdict:
    found = {label: scores["32"] for label, scores in result.values.items()}
    one = found["DeltaFormer, 1 layer"]
    best, label = max((value, label) for label, value in found.items() if label.startswith("softmax"))
    return Verdict(
        grade(one > 0.99, best < 0.98),
        f"Node accuracy: one layer of DeltaFormer {percent(one)} (with w = k "
        f"{percent(found['DeltaFormer, 1 layer, w = k, 4 heads'])}), softmax attention {percent(best)} ({label}).",
    )


REACHABILITY = Study(
    name="reachability",
    title="Reachability in a graph",
    claim="One layer of DeltaFormer finds nearly without error which nodes are connected with the first; several "
    "layers of softmax attention do not.",
    source="DeltaFormer, NeurIPS 2025, figure 5",
    measure=_measure,
    judge=_judge,
    draw=Bars(index=("run",), columns=("node accuracy", "graph accuracy"), label="share of the test split"),
    caption="Accuracy on graphs of 32 nodes: single nodes, and whole graphs without an error.",
    base={
        "task": {"name": "reachability", "length": 32, "width": 64},
        "model": {"width": 64, "heads": 4, "feedforward": "swiglu", "scan_layers": True},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 800, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 8, "log_every": 25},
    },
    rows=ROWS,
    quick=Quick(
        {"DeltaFormer, 1 layer": ROWS["DeltaFormer, 1 layer"]},
        {"task.length": 8, "task.width": 12, "model.width": 32, "train.steps": 120},
    ),
)
