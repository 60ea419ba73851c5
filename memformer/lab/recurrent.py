"""Recurrent networks: accuracy on parity by length, bits per byte on text."""

from memformer.lab.plots import Lines
from memformer.lab.runs import columns_by_length, scores_by_length
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade, numbers_in, percent
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.metrics import model_name

__all__ = ["RECURRENT"]


def _measure(runs: Runs, settings: Settings) -> Result:
    scores = {label: scores_by_length(run) for label, run in runs.items()}
    parity = [
        {"model": _name(run), **columns_by_length(run, "{} bits")} for run in runs.values() if run.task.name == "parity"
    ]
    if not parity:
        raise RunError("recurrent measures at least one run of parity, got none among the folders.")
    text = [
        {"model": _name(run), "bits per byte": round(scores[label][run.task.length]["bits_per_byte"], 3)}
        for label, run in runs.items()
        if run.task.name == "text"
    ]
    tables = [Table("Accuracy on parity by length (test split)", parity)]
    return Result([*tables, *([Table("Python's standard library as bytes, test files", text)] if text else [])])


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    return str(model["cell"]) if "cell" in model else model_name(model)


def _by_length(row: Row) -> dict[int, float]:
    return {int(name.split()[0]): numbers_in(cell)[0] for name, cell in row.items() if name.endswith(" bits")}


def _judge(result: Result) -> Verdict:
    found = {row["model"]: _by_length(row) for row in result.rows()}
    longest = max(max(scores) for scores in found.values())
    far = {name: scores[longest] for name, scores in found.items()}
    gated = [value for name, value in far.items() if name != "rnn"]
    holds = bool(gated) and max(gated) > 0.999 and far.get("rnn", 0.0) < min(gated)
    scores = ", ".join(f"{name} {percent(value)}" for name, value in far.items())
    return Verdict(
        grade(holds, bool(gated) and min(gated) > 0.999), f"Accuracy on strings of {longest} bits: {scores}."
    )


RECURRENT = Study(
    name="recurrent",
    title="Recurrent networks: parity",
    claim="A recurrent network that has learnt parity keeps the bit at any length; gated cells hold it longer than a "
    "plain tanh network.",
    source="arXiv 2411.12537, where the sLSTM is exact to length 256",
    measure=_measure,
    judge=_judge,
    draw=Lines(line="model", points="{} bits", x="bits in the string", y="accuracy", level=0.5, options={"x_base": 2}),
    caption="Parity of strings longer than those of training, test split.",
    reads="configs/parity.py and configs/text_recurrent.py",
)
