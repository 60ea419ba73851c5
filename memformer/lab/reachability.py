"""Reachability in a graph (DeltaFormer, NeurIPS 2025, figure 5).

A token is a row of the adjacency matrix of two trees; a node is reached where its parent, an earlier token, is. One
layer of DeltaFormer writes at each node what it has read at its neighbours, so that one pass follows a chain of any
length; each layer of softmax attention takes one more step along it. The row of a node does not mark the node itself:
where w = k a node finds its siblings as well as its parent, so the write has a query w of its own, as wide as the
model.
"""

from collections.abc import Mapping

from memformer.lab.plots import Bars
from memformer.lab.runs import accuracies_by_seed, runs_by_row
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent, spread

__all__ = ["REACHABILITY"]

# Stated before the runs: the node accuracy of every seed with nearly no error, and of none.
EXACT, WRONG = 0.99, 0.98

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
    length = str(next(iter(runs.values())).task.length)
    nodes, graphs = (accuracies_by_seed(runs, score) for score in ("accuracy", "sequence_accuracy"))
    rows = [
        {
            "run": label,
            "node accuracy": spread(nodes[label][length]),
            "graph accuracy": spread(graphs[label][length]),
            "steps": ", ".join(str(run.step) for run in row),
        }
        for label, row in runs_by_row(runs).items()
    ]
    title = "Node accuracy, and share of graphs without an error (test split): mean of the seeds (least to most)"
    return Result([Table(title, rows)], nodes)


def _judge(result: Result) -> Verdict:
    found = {label: scores["32"] for label, scores in result.values.items()}
    one = found["DeltaFormer, 1 layer"]
    best, label = max((max(values), label) for label, values in found.items() if label.startswith("softmax"))
    return Verdict(
        grade(min(one) > EXACT, best < WRONG),
        f"Node accuracy, mean of three seeds: one layer of DeltaFormer {spread(one)}, with w = k "
        f"{spread(found['DeltaFormer, 1 layer, w = k, 4 heads'])}; best softmax attention ({label}) "
        f"{spread(found[label])}. Needed: above {percent(EXACT, 0)} in every seed of DeltaFormer, below "
        f"{percent(WRONG, 0)} in every seed of softmax attention.",
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
    caption="Accuracy on graphs of 32 nodes: single nodes, and whole graphs without an error (mean of three seeds, "
    "least to greatest).",
    base={
        "task": {"name": "reachability", "length": 32, "width": 64},
        "model": {"width": 64, "heads": 4, "feedforward": "swiglu", "scan_layers": True},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 800, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 8, "log_every": 25},
    },
    rows=ROWS,
    seeds=3,
    quick=Quick(
        {"DeltaFormer, 1 layer": ROWS["DeltaFormer, 1 layer"]},
        {"task.length": 8, "task.width": 12, "model.width": 32, "train.steps": 120},
    ),
)
