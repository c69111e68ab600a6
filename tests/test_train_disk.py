"""What a disk can hold, and lack: nothing that was there is lost."""

import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_cases import arguments, write_data

import nsa_jax.train.cli as cli
from nsa_jax.train import loop, metrics
from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.folder import locked, set_aside, write_whole
from nsa_jax.train.metrics import MetricsLog, plot_runs, read_metrics
from nsa_jax.train.step import TrainState

GOOD = [{"step": 0, "held_out_bits_per_byte": 8.0}, {"step": 10, "bits_per_byte": 7.5, "loss": 5}]
NAMES = ["lr[1e-3]", "[", "*", "?", "**", "a\\b", "gs:", "$\\x$", "_a b", "%20", "\n", "\u65e5", os.fsdecode(b"\xff")]


def small_state(step, value=1.0):  # a number or [30000]
    return TrainState(jnp.int32(step), {"a": jnp.full(30_000, value)}, {"b": jnp.ones(3)})


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    with opened(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(small_state(3))
        checkpoints.save(small_state(6))
    return tmp_path / "checkpoints"


@contextmanager
def opened(folder, identity=None):
    checkpoints = Checkpoints(folder, identity or {})
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@contextmanager
def full_disk(size=4096):
    """Every file that grows beyond `size` bytes fails to be written."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_checkpoints_and_plot_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "run"
    for step in (1, 2, 3):
        with opened(folder) as checkpoints:
            checkpoints.save(small_state(step))
    with opened(folder) as checkpoints:
        assert int(checkpoints.restore(small_state(0)).step) == 3
    assert kept(folder) == ["2", "3"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_plot_of_runs_of_any_names(tmp_path):
    runs = [tmp_path / name for name in NAMES]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in GOOD))
    (runs[0] / "metrics.jsonl").write_text("")
    plot_runs(tmp_path / "loss.png", runs)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_full_disk_leaves_the_checkpoints(checkpoints):
    with opened(checkpoints) as there:
        with full_disk(), pytest.raises(OSError, match="checkpoint: step 9 cannot be written"):
            there.save(small_state(9, jax.random.normal(jax.random.key(0), 30_000)))
        assert kept(checkpoints) == ["3", "6"]
        assert int(there.restore(small_state(0)).step) == 6
        there.save(small_state(9))
        assert kept(checkpoints) == ["6", "9"]


def test_a_full_disk_leaves_metrics_and_results(tmp_path):
    path = tmp_path / "loss.png"
    write_whole(path, b"old")
    with full_disk(), pytest.raises(OSError):
        write_whole(path, bytes(10_000))
    assert path.read_bytes() == b"old"
    (tmp_path / "metrics.jsonl").write_text(before := "".join(json.dumps(line) + "\n" for line in GOOD * 100))
    with full_disk(), pytest.raises(OSError):
        MetricsLog(tmp_path, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(checkpoints, value):
    with opened(checkpoints) as there:
        there.save(small_state(9, value))
        with pytest.raises(ValueError, match=r"step 9 .* not finite"):
            there.restore(small_state(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("run", [[], "x", {}, {"identity": 3}, {"identity": {}}, {"step": 7}], ids=str)
def test_a_foreign_checkpoint_is_named(tmp_path, run):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(run=ocp.args.JsonSave(run)))
    with opened(tmp_path) as there, pytest.raises(ValueError, match="checkpoint: step 7"):
        there.restore(small_state(0))


def test_what_was_half_written_is_told(checkpoints):
    shutil.copytree(checkpoints / "6", checkpoints / "9.orbax-checkpoint-tmp")
    (checkpoints / "notes.txt").write_text("mine")
    with opened(checkpoints) as there:
        assert there.unfinished == ["9.orbax-checkpoint-tmp"]
        assert there.latest_step() == 6
    assert kept(checkpoints) == ["3", "6", "notes.txt"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "x",
        "3",
        "[1]",
        "null",
        '"a"',
        "{}",
        '{"step": "1"}',
        '{"step": null}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": 1, "loss": "a"}',
        '{"step": 1, "loss": [2]}',
        '{"step": 1e99}',
        '{"step": 1',
        "\0\0",
        "\udcff",
        "[" * 10**5,
    ],
    ids=lambda line: ascii(line[:20]),
)
def test_a_line_that_is_no_metrics_is_named_and_stays(tmp_path, line):
    good = "".join(json.dumps(values) + "\n" for values in GOOD)
    (tmp_path / "metrics.jsonl").write_bytes(before := f"{good}{line}\n{good}".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3, got"):
        MetricsLog(tmp_path, 10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert cli.main(["--compare", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rest", [b"{", b'{"step": 11, "lo', b"\0" * 50, b"\xff"])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, rest):
    good = "".join(json.dumps(values) + "\n" for values in GOOD).encode()
    (tmp_path / "metrics.jsonl").write_bytes(good + rest)
    assert read_metrics(tmp_path) == GOOD
    log = MetricsLog(tmp_path, 5)
    log.write(step=6)
    log.close()
    assert log.dropped == 1
    assert read_metrics(tmp_path) == [GOOD[0], {"step": 6}]


def test_one_run_at_a_time_until_it_dies(tmp_path):
    program = f"""
import os, pathlib, signal
from nsa_jax.train.folder import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    print(flush=True)
    signal.pause()
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="out: another run is at work"), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path), pytest.raises(ValueError), locked(tmp_path):
        pass


def test_killed_at_any_moment_of_writing(tmp_path):
    script = pathlib.Path(__file__).with_name("kill_sweep.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, "9"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 9 and found[-1]["moment"] == found[-1]["most"]
    for there in found:
        assert there["status"] == -signal.SIGKILL, there
        is_there = "9" in there["before"]
        assert there["step"] == (9 if is_there else 6) and there["right"], there
        assert is_there or {"3", "6"} <= set(there["before"]), there  # nothing goes before the new one is there
        assert there["unfinished"] == [name for name in there["before"] if "tmp" in name], there
        assert there["metrics"] in ([*range(1, 9)], [*range(1, 7)]), there
        assert there["after"] == [str(there["step"]), "12"] or there["after"] == ["12", str(there["step"])], there
    assert any(there["unfinished"] for there in found) and {there["step"] for there in found} == {6, 9}


def test_nothing_is_renamed_onto_what_is_there(tmp_path):
    for number in range(3):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        set_aside(tmp_path / "metrics.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "metrics.1.jsonl": "0",
        "metrics.2.jsonl": "1",
        "metrics.3.jsonl": "2",
    }


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """The command, which stops before the first step, and its folder."""
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data")
    monkeypatch.setattr(loop, "compile_step", lambda *_: None)
    monkeypatch.setattr(loop.Run, "train", lambda _: False)
    folder = tmp_path / "run"
    return lambda *extra: cli.main([*arguments(), "--data", str(data), "--out", str(folder), *extra]), folder


def test_killed_before_the_first_checkpoint(untrained, capsys):
    start, folder = untrained
    assert start() == 130
    (folder / "metrics.jsonl").write_text(before := json.dumps(GOOD[1]) + "\nforeign\n")
    assert start() == 130
    assert "found metrics.jsonl of an earlier start" in capsys.readouterr().out
    assert (folder / "metrics.1.jsonl").read_text() == before
    with locked(folder):
        assert start() == 2
    assert "another run is at work" in capsys.readouterr().err
    assert start("--resume") == 2
    assert "checkpoint: none in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("owner", "name", "call", "status", "checkpoints"),
    [
        (metrics, "write_whole", 1, 2, []),  # as the run begins
        (MetricsLog, "write", 1, 1, []),
        (MetricsLog, "write", 2, 1, ["5"]),
        (ocp.CheckpointManager, "save", 1, 1, []),
        (ocp.CheckpointManager, "save", 3, 1, ["10", "5"]),
        (loop, "write_whole", 1, 1, ["10", "12"]),  # the sample
        (metrics, "write_whole", 2, 1, ["10", "12"]),  # the plot
    ],
)
def test_a_disk_that_fills_up_ends_a_run_in_one_line(
    tmp_path, monkeypatch, capsys, owner, name, call, status, checkpoints
):
    def step(state, *_):
        return state.replace(step=state.step + 1), {
            "loss": 1.0, "bits_per_byte": 1.0, "grad_norm": 1.0, "finite": True
        }  # fmt: skip

    write, calls = getattr(owner, name), []

    def write_until_full(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)

    monkeypatch.setattr(loop, "compile_step", lambda *_: step)
    monkeypatch.setattr(loop, "make_sums", lambda *_: lambda *_: (1.0, 0.0, 1.0))
    monkeypatch.setattr(loop, "generate", lambda *_, **__: "text")
    monkeypatch.setattr(owner, name, write_until_full)
    (tmp_path / "data").mkdir()
    folder = tmp_path / "run"
    given = ["--data", str(write_data(tmp_path / "data")), "--out", str(folder)]
    assert cli.main([*arguments(steps=12), *given]) == status
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and os.strerror(errno.ENOSPC) in shown
    assert kept(folder / "checkpoints") == checkpoints
    if status == 1 and (not checkpoints or "12" not in checkpoints):
        newest = max(checkpoints, key=int, default=None)
        assert ("there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is kept") in shown
    resumed = [*arguments(steps=12), *given, *(["--resume"] if checkpoints else [])]

    assert cli.main(resumed) == 0
    assert "12" in kept(folder / "checkpoints")


def test_numbers_that_are_not_finite_end_the_run(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    given = arguments(steps=12, checkpoint_interval=2, warmup_steps=6, learning_rate=1e38)
    given += ["--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "run")]
    assert cli.main(given) == 1
    shown = capsys.readouterr().err
    assert "step 3: not finite" in shown and "the checkpoint of step 2 is kept" in shown and shown.count("\n") == 1
    assert kept(tmp_path / "run" / "checkpoints") == ["2"]
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(tmp_path / "run" / "checkpoints" / "2" / "state")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0]
