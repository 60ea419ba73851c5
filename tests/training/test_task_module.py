"""Tasks from outside the package: docs/tasks.md is run, the module travels with the run, mistakes are named."""

import dataclasses
import pathlib
import re
import sys

import pytest
from absl import flags

from memformer.tasks import TASKS, Swap, Task, import_tasks, make_task, register
from memformer.training import build
from memformer.training.config import RunError, complete_config, default_config, set_values
from memformer.training.evaluation import evaluate_checkpoint
from memformer.training.flags import define_config, parse_flags
from memformer.training.folder import read_run_config
from memformer.training.loop import train
from tests.training.small import build_counting

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")
PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
MODULE, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMAND = next(line for line in PAGE.splitlines() if line.startswith("python train.py")).split()[1:]
SMALL = {
    "model.width": 8,
    "model.heads": 2,
    "model.depth": 1,
    "model.feedforward": None,
    "model.memory_options.delta_rule.conv_width": 0,
    "train.steps": 1,
    "train.batch_size": 8,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.final_batches": 1,
    "train.tensorboard": False,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the page's files; what its module registers is forgotten afterwards."""
    (tmp_path / "my_tasks.py").write_text(MODULE)
    (tmp_path / "first.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    forget()


def forget():
    TASKS.pop("first", None)
    sys.modules.pop("my_tasks", None)


def parse(monkeypatch, *argv):
    values = flags.FlagValues()
    holder = define_config(values)
    flags.DEFINE_string("task_module", "", "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    monkeypatch.setattr(sys, "argv", list(argv))
    parse_flags(argv, values)
    return holder.value


def test_the_page_is_run_and_the_module_travels(place, monkeypatch, capsys):
    """With a model that compiles fast: the task is the same for any."""
    monkeypatch.setattr(build, "build_model", build_counting)
    assert len(MODULE.strip().splitlines()) <= 37
    assert {"first", "my_tasks"} & (set(TASKS) | set(sys.modules)) == set()
    config = parse(monkeypatch, *COMMAND)
    assert (config.task_module, config.task.tokens, config.task.length) == ("my_tasks", 4, 16)
    set_values(config, [f"{key}={value}" for key, value in SMALL.items()])
    train(config, "runs/first")
    assert read_run_config("runs/first")["task_module"] == "my_tasks"

    # as in a new process
    forget()
    result = evaluate_checkpoint("runs/first", lengths=[16, 32], batches=1)
    assert set(result["lengths"]) == {"16", "32"} and "first" in TASKS

    forget()
    (place / "my_tasks.py").rename(place / "moved_tasks.py")
    with pytest.raises(RunError, match="config: task_module must be a module that Python can import .* got 'my_tasks'"):
        evaluate_checkpoint("runs/first", batches=1)
    import_tasks("moved_tasks")
    assert complete_config(config).task.tokens == 4
    capsys.readouterr()


def test_an_unknown_task_is_told_about_the_flag(place, monkeypatch, capsys):
    for arguments, message in (
        (["--config=first.py"], "first.py, line 5: RunError: config.task.name must be one of swap.* --task_module=MOD"),
        (["--config=first.py", "--task_module=no_tasks"], "--task_module: .* got 'no_tasks': No module named 'no_t"),
        (["--config=first.py", "--task_module", "no.tasks"], "got 'no.tasks': No module named 'no'"),
        (["--task_module=.tasks", "--config=first.py"], "got '.tasks': "),
    ):
        with pytest.raises(SystemExit):
            parse(monkeypatch, "train.py", *arguments)
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error


def test_what_cannot_be_registered():
    @dataclasses.dataclass(frozen=True)
    class Mine(Task):
        length: int = 4

    class Derived(Mine):
        pass

    assert register("mine", Mine) is register("mine", Mine) is TASKS["mine"]
    try:
        assert Mine.name == "mine" and make_task({"name": "mine", "length": 5}).length == 5
        assert default_config(task="mine").task.length == 4
    finally:
        del TASKS["mine"]
    for name, task, message in (
        ("swap", Mine, "name 'swap' belongs to the task memformer.tasks.swap.Swap: choose another"),
        ("my task", Mine, "name must be an identifier, such as 'my_task', got 'my task'"),
        ("mine", Derived, r"task must be decorated with @dataclasses.dataclass\(frozen=True\), and Derived is not"),
        ("mine", make_task, "task must be a class that extends memformer.tasks.Task, got <function make_task"),
        ("mine", Swap(), "task must be a class that extends memformer.tasks.Task, got Swap"),
    ):
        with pytest.raises(ValueError, match=message):
            register(name, task)
    assert "mine" not in TASKS
