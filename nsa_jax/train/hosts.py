"""Several hosts that train together: who they are, and what they agree on."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")


def join() -> None:
    """Joins the other processes, if the environment tells of any: JAX's own variables, Slurm's or Open MPI's.

    Environment:
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: address and port of process 0, how many processes,
            and which of them this one is. Slurm and Open MPI tell JAX by their own.

    Raises:
        ValueError: JAX_NUM_PROCESSES or JAX_PROCESS_ID is not a number that goes with the other.
        RuntimeError: the others cannot be reached.
    """
    if not any(os.environ.get(name, "1") != "1" for name in _TASKS) or jax.distributed.is_initialized():
        return
    if "JAX_NUM_PROCESSES" not in os.environ:
        jax.distributed.initialize()
        return
    processes, process = (os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise ValueError(
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected a number of processes and one from 0 below it, got"
            f" {processes!r} and {process!r}"
        )
    jax.distributed.initialize(num_processes=int(processes), process_id=int(process))


def is_first() -> bool:
    """Whether this process is the one that writes metrics, plot and sample, and speaks."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any host; all of them must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def whole(x: jax.Array) -> np.ndarray:
    """An array with all its shares; all hosts must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
