"""Training on meshes of up to 8 CPU devices.

A script, run by test_train_mesh.py in a process of its own, which has so many devices. It takes an empty folder and
prints JSON.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import numpy as np
from train_cases import arguments, with_model, write_data

from nsa_jax.train import cli
from nsa_jax.train.mesh import make_mesh, parse_mesh, put
from nsa_jax.train.metrics import read_metrics
from nsa_jax.train.packing import Rows
from nsa_jax.train.step import init_state, make_train_step

MESHES = ("data=1", "data=2,fsdp=2", "data=2,fsdp=2,tensor=2")
LENGTH = 48  # no axis of a parameter has it
CONFIG = dataclasses.replace(
    with_model(num_heads=4, num_kv_heads=2, num_layers=2, remat=True), sequence_length=LENGTH, batch_size=4
)
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def steps(text):
    """Loss and gradient norm of three steps, the collectives on activations, and the share of the state on a device."""
    sizes = parse_mesh(text)
    mesh = make_mesh(jax.devices()[: int(np.prod(list(sizes.values())))], sizes)
    tokens = np.random.default_rng(0).integers(0, 250, (4, LENGTH)).astype(np.int32)
    batch = put(Rows(tokens, np.zeros_like(tokens)), mesh)
    state = init_state(CONFIG, mesh)
    step = make_train_step(CONFIG, mesh).lower(state, *batch).compile()
    shapes = [(kind, shape) for shape, kind in COLLECTIVE.findall(step.as_text())]
    leaves = jax.tree.leaves(state)
    share = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)
    numbers = []
    for _ in range(3):
        state, metrics = step(state, *batch)
        numbers += [float(metrics["loss"]), float(metrics["grad_norm"])]
    moved = sorted({kind for kind, shape in shapes if re.search(rf"\b{LENGTH}\b|\b{LENGTH - 1}\b", shape)})
    return {"numbers": numbers, "moved": moved, "share": share}


def train(data, out, *more):
    status = cli.main([*arguments(steps=10, num_kv_heads=2), "--data", str(data), "--out", str(out), *more])
    return [status, [line["loss"] for line in read_metrics(out) if "loss" in line]]


def resumed(folder):
    """(status, losses) of a run on 4 devices, and of it resumed on others from its checkpoint of step 5."""
    data = folder / "data"
    data.mkdir()
    write_data(data)
    four = ("--devices=4", "--mesh=data=2,fsdp=2")
    results = {"4": train(data, folder / "four", *four)}
    for name, more in {"2": ("--devices=2", "--mesh=tensor=2"), "1": ("--devices=1",)}.items():
        shutil.copytree(folder / "four", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "10")
        results[name] = train(data, folder / name, "--resume", *more)
    return results


if __name__ == "__main__":
    screen, sys.stdout = sys.stdout, sys.stderr
    found = {"steps": {text: steps(text) for text in MESHES}, "resumed": resumed(pathlib.Path(sys.argv[1]))}
    print(json.dumps(found), file=screen)
