"""The TPU compiler up to its assignment of buffers, in a process of its own that is ended there.

What follows, the scheduling of instructions, takes nine tenths of the time and changes nothing that a dry run reads but
the size of the code.
"""

import concurrent.futures
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from memformer.training.config import RunError

__all__ = ["compile_to_buffers", "compile_whole", "read_buffers", "run_apart"]

# what libtpu writes to the folder of `xla_dump_to` before it schedules instructions, in this order
SIZES = "*.after_optimizations-buffer-assignment.txt"
PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"
POLL = 0.05


def compile_whole(lowered: jax.stages.Lowered, options: dict[str, Any] | None = None) -> tuple[int, str]:
    """Compiles to the end: bytes of device memory, code included, and the text of the program."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options=options or {"xla_dump_to": folder})
        found = read_buffers(pathlib.Path(folder))
    need: Any = compiled.memory_analysis()
    if found is not None:
        # libtpu's own sum of the temporaries has their fragmentation twice
        return found[0] + need.generated_code_size_in_bytes, found[1]
    total = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
    return total + need.temp_size_in_bytes + need.generated_code_size_in_bytes, compiled.as_text() or ""


def compile_to_buffers(lowered: jax.stages.Lowered) -> tuple[int, str]:
    """Compiles for TPUs until the buffers are assigned: bytes of device memory without code, and the program's text.

    The compiler cannot be stopped: it runs in a thread until the process ends.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler raises before, such as an overflow of the memory.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compiling = pool.submit(lowered.compile, compiler_options={"xla_dump_to": folder})
        while not compiling.done():
            found = read_buffers(pathlib.Path(folder))
            if found is not None:
                return found
            time.sleep(POLL)
        compiling.result()
        found = read_buffers(pathlib.Path(folder))
    if found is not None:
        return found
    raise RuntimeError(f"libtpu has not written {SIZES} and {PROGRAM}: use --dryrun_full")


def read_buffers(folder: pathlib.Path) -> tuple[int, str] | None:
    """Bytes in device memory and the text of the program from a dump of the compiler; None until it has written both.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> sizes = "BufferAssignment:\\nallocation 0: size 24, parameter 0\\nallocation 1: size 8, color 1, temp\\n"
      >>> _ = (folder / "m.after_optimizations-buffer-assignment.txt").write_text(sizes)
      >>> read_buffers(folder) is None
      True
      >>> _ = (folder / "m.after_optimizations_after_buffer_assignment.txt").write_text("ENTRY %main {\\n}\\n")
      >>> read_buffers(folder)
      (24, 'ENTRY %main {\\n}\\n')
    """
    programs, sizes = list(folder.glob(PROGRAM)), list(folder.glob(SIZES))
    text = programs[0].read_text() if programs and sizes else ""
    # it may be half written: the entry computation stands last
    if "ENTRY " not in text or not text.rstrip("\n").endswith("\n}"):
        return None
    # the other colors are memories on the chip
    found = re.findall(r"^allocation \d+: size (\d+)(, color \d+)?", sizes[0].read_text(), re.MULTILINE)
    return sum(int(size) for size, color in found if not color), text


def run_apart(config: Mapping[str, Any], where: str) -> Any:
    """`dryrun.compile_step(config, where, full=False)` in a process of its own, which ends with the answer."""
    # whatever can be imported here can be imported there
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder, "found")
        question = pickle.dumps((dict(config), where, str(found)))
        command = [sys.executable, "-c", f"from {__name__} import _answer; _answer()"]
        process = subprocess.run(command, input=question, env=environment, stderr=subprocess.PIPE, check=False)
        if not found.exists():
            said = process.stderr.decode(errors="replace")
            raise RuntimeError(f"the process of the dry run ended with code {process.returncode}:\n{said}")
        result = pickle.loads(found.read_bytes())
    if isinstance(result, Exception):
        raise result
    return result


def _answer() -> None:
    """The other process of `run_apart`."""
    from memformer.training.dryrun import compile_step

    config, where, path = pickle.loads(sys.stdin.buffer.read())
    try:
        result: Any = compile_step(config, where, full=False)
    except RunError as error:
        # raised by the caller
        result = error
    pathlib.Path(path).write_bytes(pickle.dumps(result))
    # the compiler is still running
    os._exit(0)
