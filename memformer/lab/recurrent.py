"""What recurrent networks reach: accuracy on parity by length, bits per byte on text."""

from collections.abc import Sequence
from typing import Any

from memformer.lab.study import Study, new_figure
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.metrics import model_name
from memformer.training.plots import COLOURS

__all__ = ["measure"]


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Tables and a plot of what finished runs of parity, and of text, scored on the test split.

    Raises:
      RunError: no run of parity, or a run that has not ended.
    """
    results = [(_name(run), run, _scores(run)) for run in runs]
    tracked = {name: scores for name, run, scores in results if run.task.name == "parity"}
    if not tracked:
        raise RunError("recurrent measures at least one run of parity, got none among the folders.")
    study.claim = (
        "A recurrent network keeps one bit for any length once it has learnt to (2411.12537 has the sLSTM at 1.000 to "
        "length 256); gates hold it longer than a plain tanh network does."
    )
    study.add_table("Parity, accuracy of one answer by length (test split)", [_row(n, s) for n, s in tracked.items()])
    read = [
        {"model": name, "bits per byte": round(scores[run.task.length]["bits_per_byte"], 3)}
        for name, run, scores in results
        if run.task.name == "text"
    ]
    if read:
        study.add_table("Bytes of Python's standard library, test files", read)
    study.outcome = "Parity: " + ", ".join(
        f"{name} {100 * scores[max(scores)]['accuracy']:.1f}% at {max(scores)} bits" for name, scores in tracked.items()
    )
    study.outcome += "".join(f"; {row['model']} reads text at {row['bits per byte']:.2f} bits per byte" for row in read)
    study.outcome += "."
    figure, axes = new_figure()
    for colour, (name, scores) in zip(COLOURS, tracked.items(), strict=False):
        lengths = sorted(scores)
        axes[0, 0].plot(lengths, [scores[n]["accuracy"] for n in lengths], "o-", color=colour, label=name)
    axes[0, 0].axhline(0.5, color="0.4", linestyle=":", label="guess")
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xlabel("bits in the string")
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(frameon=False)
    study.save_figure(figure, "parity", f"Parity of strings longer than those of training. Claim: {study.claim}")


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    return str(model["cell"]) if "cell" in model else model_name(model)


def _scores(run: LoadedRun) -> dict[int, dict[str, float]]:
    if run.result is None:
        raise RunError(f"recurrent measures finished runs, and {run.folder} has no result.json yet.")
    return {int(length): values for length, values in run.result["lengths"].items()}


def _row(name: str, scores: dict[int, dict[str, float]]) -> dict[str, Any]:
    return {"model": name, **{f"{n} bits": f"{100 * scores[n]['accuracy']:.1f}%" for n in sorted(scores)}}
