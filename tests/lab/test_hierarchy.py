"""The study of regular languages, on recorded scores."""

import types

from memformer.lab.hierarchy import HIERARCHY, LENGTHS
from memformer.tasks import make_task


def test_scores_are_scaled_by_chance_and_judged_by_the_best_seed():
    """Chance is 1/2 on parity, 1/5 on modular arithmetic."""
    # accuracy of seeds 0 and 1; those that are not given guess
    recorded = {
        "parity DeltaFormer": (0.5, 0.75),
        "parity DeltaFormer, linear read": (0.6, 1.0),
        "parity LSTM": (0.5, 1.0),
        "modular_arithmetic DeltaFormer, linear read": (0.2, 0.6),
        "modular_arithmetic LSTM": (1.0, 1.0),
    }
    assert set(recorded) < set(HIERARCHY.rows)
    runs = {}
    for label in HIERARCHY.rows:
        task = make_task({"name": label.split()[0]})
        for seed in (0, 1):
            value = recorded.get(label, (1 / task.num_classes,) * 2)[seed]
            lengths = {str(n): {"accuracy": value} for n in (10, *LENGTHS)}
            runs[f"{label} seed {seed}"] = types.SimpleNamespace(task=task, result={"lengths": lengths})
    result = HIERARCHY.measure(runs, {})
    rows = {f"{row['task']} {row['model']}": row for row in result.rows()}
    assert rows["parity LSTM"]["at 250"] == "50.0% (0.0% to 100.0%)"
    arithmetic = rows["modular_arithmetic DeltaFormer, linear read"]
    assert arithmetic["at 250"] == "25.0% (0.0% to 50.0%)" and arithmetic["paper"] == "100.0%"
    assert "at 10" not in arithmetic and rows["parity Transformer"]["paper"] == "4.0%"
    verdict = HIERARCHY.judge(result)
    assert verdict.kind == "partly confirmed"
    assert "DeltaFormer 25.0% (0.0% to 50.0%), DeltaFormer, linear read 60.0%" in verdict.finding
    (first, *_) = HIERARCHY.summary(result)
    assert first["DeltaFormer"] == "25.0% (0.0% to 50.0%)" and len(first) == 5
