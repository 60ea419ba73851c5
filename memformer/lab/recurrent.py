"""Recurrent networks: accuracy on parity by length, bits per byte on text."""

from memformer.lab.plots import Lines
from memformer.lab.runs import accuracy_by_length, columns_by_length, measure_seeds, scores_by_length
from memformer.lab.study import Result, Runs, Settings, Study, Table, Verdict, grade, percent, spread
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.metrics import model_name

__all__ = ["RECURRENT"]


# Stated before the runs: an exact network has this accuracy at the greatest length in every seed.
EXACT = 0.999


@measure_seeds
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
    tables += [Table("Python's standard library as bytes, test files", text)] if text else []
    found = {_name(run): accuracy_by_length(run) for run in runs.values() if run.task.name == "parity"}
    return Result(tables, {name: {str(n): round(x, 4) for n, x in scores.items()} for name, scores in found.items()})


def _name(run: LoadedRun) -> str:
    model = run.config["model"]
    return str(model["cell"]) if "cell" in model else model_name(model)


def _judge(result: Result) -> Verdict:
    longest = max((n for scores in result.values.values() for n in scores), key=int)
    far = {name: scores[longest] for name, scores in result.values.items()}
    gated = {name: seeds for name, seeds in far.items() if name != "rnn"}
    exact = [name for name, seeds in gated.items() if min(seeds) > EXACT]
    plain = max(far.get("rnn", [0.0])) < min((min(seeds) for seeds in gated.values()), default=0.0)
    scores = ", ".join(f"{name} {spread(seeds)}" for name, seeds in far.items())
    return Verdict(
        grade(bool(exact) and plain, bool(exact) and len(exact) == len(gated)),
        f"Accuracy on strings of {longest} bits: {scores}. Needed: {percent(EXACT)} in every seed of each gated cell "
        "(of one for a part), and every seed of the plain network below those of gated cells.",
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
    caption="Parity of strings longer than those of training, test split (mean of three seeds, least to greatest).",
    reads="configs/parity.py and configs/text_recurrent.py",
)
