"""Runs of several processes: one per host on TPU pods and clusters, or several on one machine."""

import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from memformer.training.config import RunError
from memformer.training.peers import Peers

__all__ = ["agree", "first_text", "join_processes"]


def join_processes(where: str, *, heartbeat: int = 100, wait: int = 300) -> Peers:
    """Joins a run of several processes; call it before any other use of JAX.

    All processes run the same command and share the run's folder. Afterwards `jax.devices()` lists the devices of
    all processes.

    Args:
      where: "" for a single process; "auto" where the cluster provides the addresses (TPU pods, SLURM, Open MPI,
        Kubernetes); otherwise "host:port,processes,index": address of process 0, their number, index of this one.
      heartbeat: seconds without a sign of life after which a process counts as lost; one that is killed is noticed
        at once.
      wait: seconds to wait for the other processes.

    Returns:
      A context manager for what the processes do together; inside it, a process that is lost ends the others.

    Raises:
      RunError: another text, or a cluster that provides no addresses.

    Example:
      >>> with join_processes(""):
      ...     jax.process_count()
      1
    """
    if not where:
        return Peers()
    address, *numbers = where.split(",")
    if where != "auto":
        plain = ":" in address and len(numbers) == 2 and all(number.isdecimal() for number in numbers)
        if not plain or int(numbers[1]) >= int(numbers[0]):
            raise RunError(
                "--processes must be auto, or host:port,processes,index with index below processes such as "
                f"10.0.0.1:1234,2,0, got {where!r}."
            )
    alone = threading.Timer(wait, _give_up, (where, wait))
    alone.daemon = True
    alone.start()
    # JAX aborts with a dump at its own limit, which must not come first
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "initialization_timeout": wait + 60}
    try:
        if where == "auto":
            jax.distributed.initialize(**limits)
        else:
            jax.distributed.initialize(address, num_processes=int(numbers[0]), process_id=int(numbers[1]), **limits)
    except ValueError as error:
        raise RunError(f"--processes={where} cannot be joined: {error}") from error
    finally:
        alone.cancel()
    return Peers(jax.process_index(), jax.process_count(), heartbeat)


def _give_up(where: str, wait: int) -> None:
    sys.stderr.write(
        f"error: --processes={where} waited {wait} s for the other processes. Start the same command on every host, "
        "with an address of process 0 that all hosts reach; a longer wait is --join_timeout.\n"
    )
    sys.stderr.flush()
    os._exit(1)


def agree(value: int) -> int:
    """Returns the value of process 0 in every process; all of them call it.

    Example:
      >>> agree(3)
      3
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_text(text: str | None) -> str | None:
    """Returns the text of the first process that has one, in every process; all of them call it.

    Example:
      >>> first_text("damaged")
      'damaged'
    """
    if jax.process_count() == 1:
        return text
    given = np.zeros(512, np.uint8)
    bytes_ = np.frombuffer((text or "").encode()[: given.size], np.uint8)
    given[: bytes_.size] = bytes_
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(given))
    return next(filter(None, texts), None)
