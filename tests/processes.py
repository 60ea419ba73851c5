"""Scripts of the repository in processes of their own, forked from one that has imported the library already.

An import takes two seconds, and such a process starts in some milliseconds. It is a process as any: it is killed,
stopped and interrupted by signals, and ends with an exit status. Learning curves are not drawn: each takes as long as
forty small steps, and test_loop draws one.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

EMPTY: Mapping[str, str] = {}
ROOT = pathlib.Path(__file__).parents[1]
# What the scripts import, also on first use.
IMPORTED: tuple[str, ...] = (
    "memformer.training.loop",
    "memformer.training.evaluation",
    "memformer.training.generation",
)
IMPORTED += ("memformer.training.flags", "memformer.training.distributed", "memformer.training.plots", "memformer.lab")
IMPORTED += ("grain", "matplotlib.figure", "matplotlib.backends.backend_agg")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.processes", *IMPORTED])


def _run(command: Sequence[str], output: tuple[str, str], environment: Mapping[str, str]) -> None:
    """In the new process: stdout and stderr are appended to two files, or to one."""
    for number, path in enumerate(output, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # a background shell has its children ignore them, and a trainer respects that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import jax

    from memformer.training import report

    report.plot_learning_curve = lambda *_, **__: None
    os.environ.update(environment)
    # JAX has read its variables when it was imported
    jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = list(command)
    try:
        if command[0].endswith(".py"):
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        # multiprocessing ends a process without them
        atexit._run_exitfuncs()


class Script:
    """A script that runs in a process of its own; used as a `subprocess.Popen`.

    Args:
      command: path of the script in the repository, or the name of a module, and its arguments.
      out: file to which its stdout is appended.
      err: file of its stderr; by default `out`.
      environment: changed variables; JAX_NUM_CPU_DEVICES is 1 if it is not among them.
    """

    def __init__(self, command: Sequence[str], out: str, err: str = "", environment: Mapping[str, str] = EMPTY):
        output, environment = (str(out), str(err or out)), {"JAX_NUM_CPU_DEVICES": "1", **dict(environment)}
        words = [str(word) for word in command]
        self._process = FORKED.Process(target=_run, args=(words, output, environment), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """The exit status at its end."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, seconds or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def launch(command: Sequence[str], log: str, environment: Mapping[str, str] = EMPTY) -> Script:
    """Starts a script; its output is appended to `log`."""
    return Script(command, log, environment=environment)


def run_script(*command: str) -> subprocess.CompletedProcess:
    """Runs a script to its end; returns its exit status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
        code = Script(command, out, err).wait(180)
        return subprocess.CompletedProcess(command, code, pathlib.Path(out).read_text(), pathlib.Path(err).read_text())
