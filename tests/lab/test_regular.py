"""The study of regular languages, on recorded scores."""

import types

from memformer.lab.regular import LENGTHS, REGULAR
from memformer.tasks import make_task


def test_scores_are_scaled_by_chance_and_judged_by_the_best_seed():
    """Chance is 1/2 on parity, 1/5 on modular arithmetic."""
    recorded = {
        "parity LSTM": (0.5, 1.0),
        "even_pairs LSTM": (1.0, 1.0),
        "cycle_navigation LSTM": (0.2, 0.97),
        "cycle_navigation LSTM, unbiased moves": (0.2, 0.2),
        "modular_arithmetic LSTM": (0.2, 0.6),
        "modular_arithmetic LSTM, one label per string": (0.2, 0.2),
    }
    assert list(recorded) == list(REGULAR.rows)
    runs = {
        f"{label} seed {seed}": types.SimpleNamespace(
            task=make_task({"name": label.split()[0]}),
            result={"lengths": {str(n): {"accuracy": value} for n in (10, *LENGTHS)}},
        )
        for seed in (0, 1)
        for label, value in ((label, values[seed]) for label, values in recorded.items())
    }
    result = REGULAR.measure(runs, {})
    rows = {f"{row['task']} {row['model']}": row["at 250"] for row in result.rows()}
    assert (
        rows["parity LSTM"] == "50.0% (0.0% to 100.0%)" and rows["modular_arithmetic LSTM"] == "25.0% (0.0% to 50.0%)"
    )
    verdict = REGULAR.judge(result)
    assert verdict.kind == "partly confirmed" and "cycle navigation LSTM 48.1%" in verdict.finding
