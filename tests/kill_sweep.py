"""Kills processes at moments of their writing, and says what the next one finds; a script, run by test_train_disk.py.

usage: python kill_sweep.py FOLDER MOMENTS

A moment is an audit event that touches the disk: a file opened for writing, a folder made, a rename, a removal. MOMENTS
of them, evenly spread, are taken of what a process does that has the checkpoints 3 and 6 and metrics, saves checkpoint
9 and drops metrics after step 6. It prints a line of JSON for each moment. Every process is forked before JAX begins.
"""

import json
import os
import pathlib
import shutil
import signal
import sys

import jax.numpy as jnp
import numpy as np

from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.metrics import MetricsLog, read_metrics
from nsa_jax.train.step import TrainState

TOUCHES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


def state(step):
    return TrainState(jnp.int32(step), {"a": jnp.full(30_000, float(step))}, {"b": jnp.ones(3)})


def prepare(folder):
    checkpoints = Checkpoints(folder / "checkpoints", {})
    for step in (3, 6):
        checkpoints.save(state(step))
    checkpoints.close()
    log = MetricsLog(folder, 0)
    for step in range(1, 9):
        log.write(step=step, loss=1.0)


def work(folder, moment=None):
    """Writes, and is killed at the moment; gives the number of moments."""
    passed = 0

    def audit(event, args):
        nonlocal passed
        writes = event == "open" and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in TOUCHES) and str(folder) in str(args[0]):
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    checkpoints = Checkpoints(folder / "checkpoints", {})
    checkpoints.save(state(9))
    checkpoints.close()
    MetricsLog(folder, 6).close()
    return passed


def look(folder):
    """What a process finds, and whether it can go on."""
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    checkpoints = Checkpoints(folder / "checkpoints", {})
    found = checkpoints.restore(state(0))
    right = np.array_equal(found.params["a"], np.full(30_000, float(found.step)))
    checkpoints.save(state(12))
    checkpoints.close()
    return {
        "before": before,
        "unfinished": checkpoints.unfinished,
        "step": int(found.step),
        "right": right,
        "metrics": [line["step"] for line in read_metrics(folder)],
        "after": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def in_child(function, *arguments):
    """(what it gives, its exit status), of a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        os.write(writer, json.dumps(function(*arguments)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    return json.loads(text) if text else None, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root, moments):
    base = root / "base"
    base.mkdir()
    in_child(prepare, base)

    def copy(name):
        return pathlib.Path(shutil.copytree(base, root / name))

    most, _ = in_child(work, copy("whole"))
    chosen = sorted({1 + i * (most - 1) // (moments - 1) for i in range(moments)})
    folders = [copy(str(moment)) for moment in chosen]
    statuses = [in_child(work, folder, moment)[1] for folder, moment in zip(folders, chosen, strict=True)]
    found, _ = in_child(lambda: [look(folder) for folder in folders])
    for moment, status, values in zip(chosen, statuses, found, strict=True):
        print(json.dumps({"moment": moment, "most": most, "status": status, **values}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
