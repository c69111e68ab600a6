"""Training on several devices and hosts: the mesh, who holds what, and the same losses whatever the devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from train_cases import arguments, write_data

from nsa_jax.train import cli
from nsa_jax.train.mesh import parse_mesh
from nsa_jax.train.metrics import read_metrics

HERE = pathlib.Path(__file__).parent


def start(*command, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    process = start("train_mesh.py", tmp_path_factory.mktemp("runs"))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-4000:]
    return json.loads(output)


def test_every_mesh_takes_the_steps_of_one_device(found):
    one = found["steps"]["data=1"]["numbers"]
    for fact in found["steps"].values():
        np.testing.assert_allclose(fact["numbers"], one, rtol=1e-5)  # float32 sums in another order


def test_fsdp_shares_the_state(found):
    assert found["steps"]["data=2,fsdp=2"]["share"] < 0.51


def test_activations_move_for_tensor_alone(found):
    moved = {text: fact["moved"] for text, fact in found["steps"].items()}
    assert moved == {"data=1": [], "data=2,fsdp=2": [], "data=2,fsdp=2,tensor=2": ["all-reduce"]}


def test_a_run_of_four_devices_goes_on_on_two_and_on_one(found):
    (_, expected), *_ = found["resumed"].values()
    for status, losses in found["resumed"].values():
        assert status == 0
        assert len(losses) == 1
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_two_hosts_train_together(tmp_path):
    """Each has two devices and puts its rows on them; the first writes."""
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(out, *more, **environment):
        options = arguments(steps=10, checkpoint_interval=100, num_kv_heads=2)
        command = "-m", "nsa_jax.train", *options, "--data", data, "--out", out, *more
        flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        return start(*command, XLA_FLAGS=flags, **environment)

    hosts = [
        run(
            tmp_path / "two",
            "--devices=4",
            "--mesh=data=2,fsdp=2",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=600) for process in hosts]
    assert [process.returncode for process in hosts] == [0, 0], said
    assert b"4 device(s)" in said[0][0]
    assert b"4 device(s)" not in said[1][0]
    alone = run(tmp_path / "one", "--devices=1")
    alone.communicate(timeout=600)
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize(
    "text", ["", "2", "data", "data=", "data=0", "data=-1", "rows=2", "data=2,data=2", "data=2;fsdp=2", "data=²"]
)
def test_a_mesh_that_is_none(text, capsys):
    assert cli.main(arguments(mesh=text)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nsa-train: error: mesh: expected data, fsdp, tensor, each at most once")


def test_axes_that_are_not_named_have_one_device():
    assert parse_mesh("fsdp=4, data=2") == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "data=3", "devices": 2}, "mesh: expected axes of 2 devices together, got data=3"),
        ({"mesh": "tensor=2", "devices": 2}, "num_kv_heads: expected a multiple of the 2 devices of tensor, got 1"),
        ({"mesh": "data=2", "devices": 2, "batch_size": 3}, "batch_size: expected a multiple of the 2 devices"),
    ],
)
def test_what_a_mesh_does_not_divide(options, message, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    assert cli.main([*arguments(**options), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
