"""The command: a whole run, runs that are cut short and go on, and errors."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_cases import arguments, write_data

import nsa_jax.train.cli as cli
from nsa_jax.train import command as command_line
from nsa_jax.train.metrics import MetricsLog, read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = start(data, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def command(data, folder, *extra, **options):
    return [*arguments(**options), "--data", str(data), "--out", str(folder), *extra]


def start(data, folder, *extra, kill_at=None):
    """The command in a process of its own, which kills itself as checkpoint `kill_at` is about to be put in place."""
    program = f"""
import os, signal, sys
def kill(event, args):
    if event == "os.rename" and str(args[1]).endswith("checkpoints/{kill_at}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from nsa_jax.train.cli import main
sys.exit(main(sys.argv[1:]))
"""
    return subprocess.run(
        [sys.executable, "-c", program, *command(data, folder, *extra)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def final_state(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoints" / "20" / "state")


def measured(folder):
    """The metrics without what the clock and the machine say."""
    machine = {"tokens_per_second", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in machine} for line in read_metrics(folder)]


def test_a_run_leaves_everything_behind(finished):
    folder, shown = finished
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "sample.txt").read_text()) <= 8
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [10, 20]
    held_out = {line["step"]: line["held_out_bits_per_byte"] for line in lines if "held_out_bits_per_byte" in line}
    assert list(held_out) == [0, 10, 20]
    assert held_out[0] == pytest.approx(8, abs=0.3)
    assert held_out[20] < held_out[0] - 0.5
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["15", "20"]
    for expected in ("NSA through jnp (XLA) on cpu", "step 20: held out", "sample", "tokens/s", "GiB"):
        assert expected in shown


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(data, finished, tmp_path):
    folder = tmp_path / "killed"
    killed = start(data, folder, kill_at=10)
    assert killed.returncode == -signal.SIGKILL
    # checkpoint 10 is complete but for its name; steps 6 to 10 are lost
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert "5" in left and "10" not in left and any(name.startswith("10.") for name in left)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # as if killed in mid-line
    resumed = start(data, folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    jax.tree.map(np.testing.assert_array_equal, final_state(folder), final_state(finished[0]))
    assert measured(folder) == measured(finished[0])
    assert (folder / "sample.txt").read_text() == (finished[0] / "sample.txt").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["15", "20"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(data, tmp_path, monkeypatch, capsys, number):
    write = MetricsLog.write

    def write_and_interrupt(self, **values):
        write(self, **values)
        if "loss" in values:
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsLog, "write", write_and_interrupt)
    usual = signal.getsignal(number)
    assert cli.main(command(data, tmp_path / "run", checkpoint_interval=100)) == 130
    assert signal.getsignal(number) is usual
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["10"]
    assert "interrupted after step 10" in capsys.readouterr().out


def refused(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("nsa-train: error: ") and shown.count("\n") == 1
    return shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 40}, "sequence_length: expected a multiple of block_size=16, got 40"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads: expected a multiple of num_kv_heads=2, got 3"),
        ({"preset": "huge"}, "preset: expected one of tiny, small, 340m, got 'huge'"),
        ({"dtype": "float8"}, "dtype: expected bfloat16 or float32, got 'float8'"),
        ({"devices": 99}, "devices: expected 1 to"),
        ({"held_out": 1.5}, "held_out: expected a fraction between 0 and 1, got 1.5"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"attention": "flash"}, "attention: expected 'nsa' or 'dense', got 'flash'"),
        ({"compression": "max"}, "compression: expected 'mean', 'mlp' or a linen module, got 'max'"),
        ({"compression_stride": 5}, "compression_stride"),
        ({"compare": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(data, tmp_path, capsys, options, message):
    assert message in refused(capsys, *command(data, tmp_path, **options))


def test_bad_data(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "data: no non-empty files that match '*'" in refused(capsys, *command(empty, tmp_path))
    assert "data: no such file or folder" in refused(capsys, *command(tmp_path / "nowhere", tmp_path))
    (empty / "dangling.txt").symlink_to(tmp_path / "gone")
    assert "dangling.txt" in refused(capsys, *command(empty, tmp_path))


def test_a_folder_that_holds_a_run_is_not_trained_over(data, finished, capsys):
    before = (finished[0] / "metrics.jsonl").read_bytes()
    assert "holds a run; go on with --resume" in refused(capsys, *command(data, finished[0]))
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_what_does_not_fit(data, finished, tmp_path, capsys):
    assert "checkpoint: none in" in refused(capsys, *command(data, tmp_path / "new", "--resume"))
    changed = command(data, finished[0], "--resume", hidden_size=32)
    assert "has hidden_size=16, this run 32" in refused(capsys, *changed)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "0.txt").write_bytes(b"something else altogether")
    assert "data_checksum" in refused(capsys, *command(other, finished[0], "--resume"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_resume_refuses_a_corrupt_checkpoint(data, finished, tmp_path, capsys):
    folder = tmp_path / "corrupt"
    shutil.copytree(finished[0], folder)
    files = [path for path in (folder / "checkpoints" / "20" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert "checkpoint: step 20" in refused(capsys, *command(data, folder, "--resume"))


def test_missing_packages_are_named(monkeypatch, capsys):
    find = command_line.importlib.util.find_spec
    monkeypatch.setattr(
        command_line.importlib.util, "find_spec", lambda name: None if name in ("optax", "orbax") else find(name)
    )
    message = refused(capsys, "--steps=1")
    assert "optax, orbax-checkpoint not installed; pip install 'nsa-jax[train]'" in message


@pytest.mark.parametrize("module", ["nsa_jax", "nsa_jax.linen", "nsa_jax.train.cli"])
def test_importing_needs_none_of_the_training_packages(module):
    # flax itself imports optax and orbax where they are installed
    program = f"import {module}, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_comparing_draws_the_other_run(data, finished, tmp_path):
    folder = tmp_path / "second"
    assert cli.main(command(data, folder, "--compare", str(finished[0]), steps=10, attention="dense")) == 0
    assert (folder / "loss.png").stat().st_size > 10_000
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
