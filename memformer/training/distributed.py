"""Runs of several processes: one per host on TPU pods and clusters, or several on one machine."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from memformer.training.config import RunError

__all__ = ["agree", "join_processes"]


def join_processes(where: str) -> None:
    """Joins a run of several processes; call it before any other use of JAX.

    All processes run the same command and share the run's folder. Afterwards `jax.devices()` lists the devices of
    all processes.

    Args:
      where: "" for a single process; "auto" where the cluster provides the addresses (TPU pods, SLURM, Open MPI,
        Kubernetes); otherwise "host:port,processes,index": address of process 0, their number, index of this one.

    Raises:
      RunError: another text, or a cluster that provides no addresses.

    Example:
      >>> join_processes("")
    """
    if not where:
        return
    address, *numbers = where.split(",")
    if where != "auto":
        plain = ":" in address and len(numbers) == 2 and all(number.isdecimal() for number in numbers)
        if not plain or int(numbers[1]) >= int(numbers[0]):
            raise RunError(
                "--processes must be auto, or host:port,processes,index with index below processes such as "
                f"10.0.0.1:1234,2,0, got {where!r}."
            )
    try:
        if where == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(address, num_processes=int(numbers[0]), process_id=int(numbers[1]))
    except ValueError as error:
        raise RunError(f"--processes={where} cannot be joined: {error}") from error


def agree(value: int) -> int:
    """Returns the value of process 0 in every process; all of them call it.

    Example:
      >>> agree(3)
      3
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
