"""What a shell can pass: every bad option, file and folder is one line and status 2 before a folder is made."""

import os
import subprocess
import sys
import threading

import pytest
from train_cases import arguments, write_data

import nsa_jax.train.cli as cli
from nsa_jax.train.documents import read_documents, split

NUMBERS = [name for name, (kind, _) in {**cli._MODEL_OPTIONS, **cli._RUN_OPTIONS}.items() if kind in (int, float)]
# what means none, or never, or is a number as others are; the model's sizes are left to the next test
ALLOWED = {
    "0": {"warmup_steps", "seed", "sample_bytes", "weight_decay"},
    "inf": {"clip_norm"},
    "1e999": {"clip_norm"},
    "9" * 5000: {"clip_norm"},
    str(10**25): {"eval_rows", "eval_interval", "checkpoint_interval", "learning_rate", "weight_decay", "clip_norm"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def refusal(capsys, folder, *given):
    """The one line that the command says."""
    assert cli.main([*given, "--out", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("nsa-train: error: ") and shown.err.count("\n") == 1 and len(shown.err) < 700
    assert not folder.exists()
    return shown.err


@pytest.mark.parametrize(
    "value",
    ["0", "-1", "nan", "inf", "-inf", str(10**25), "9" * 5000, "1e999", "", " ", "["],
    ids=lambda value: repr(value[:8]),
)
def test_no_number_gets_past_the_checks(data, tmp_path, capsys, monkeypatch, value):
    # what is refused here is refused before the text is read
    monkeypatch.setattr("nsa_jax.train.documents.read_documents", lambda *_: pytest.fail("accepted"))
    accepted = set()
    for name in [*NUMBERS, "devices"]:
        try:
            assert name in refusal(capsys, tmp_path / "run", *arguments(**{name: value})).replace("-", "_")
        except pytest.fail.Exception:
            accepted.add(name)
    assert accepted - set(cli._MODEL_OPTIONS) == ALLOWED.get(value, set())


@pytest.mark.parametrize(
    "option",
    [
        {"block_size": 10**6 + 1},
        {"block_counts": -1},
        {"window_size": -1},
        {"compression_window": 0},
        {"compression_window": 10**25},
        {"compression_stride": 0},
        {"compression_stride": -4},
        {"hidden_size": 2**31 - 1},
        {"num_layers": 2**31 - 1},
        {"head_dim": 2**31},
        {"batch_size": 2**31 - 1},
        {"sequence_length": 2**31 - 16},
        {"sample_bytes": 2**31 - 1},
        {"implementation": ""},
        {"compression": ""},
        {"attention": " "},
    ],
    ids=str,
)
def test_what_makes_no_model_is_refused(data, tmp_path, capsys, option):
    (name,) = option
    assert name in refusal(capsys, tmp_path / "run", *arguments(**option), "--data", str(data))


@pytest.mark.parametrize("option", ["--data", "--compare", "--pattern"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_unset_variable_is_not_the_current_folder(data, tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.chdir(data)
    assert option[2:] in refusal(capsys, tmp_path / "run", "--data", ".", option, value)


@pytest.mark.parametrize("value", ["", " "])
def test_an_unset_out_is_not_the_default(data, capsys, monkeypatch, value):
    monkeypatch.chdir(data)
    assert cli.main(["--data", ".", f"--out={value}"]) == 2
    assert "out: expected" in capsys.readouterr().err
    assert not (data / "runs").exists()


@pytest.mark.parametrize("pattern", ["/x/*", "../*", "**/../*", ".", "./", "/"])
def test_patterns_stay_inside_the_folder(data, tmp_path, capsys, pattern):
    assert "pattern: expected" in refusal(capsys, tmp_path / "run", "--data", str(data), "--pattern", pattern)


@pytest.mark.parametrize(
    "given", [["--step"], ["--nonsense"], ["--steps", "x"], ["--data"], ["a", "b"], ["--learning-rate", "-inf"]]
)
def test_what_argparse_refuses_is_one_line_too(tmp_path, capsys, given):
    refusal(capsys, tmp_path / "run", *given)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "a\0b", "loop", "dangling", "new\nline", "\udcff"])
def test_no_file(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    refusal(capsys, tmp_path / "run", "--data", name)


def test_a_fifo_without_a_writer_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    assert "no non-empty files" in refusal(capsys, tmp_path / "run", "--data", str(tmp_path / "fifo"))
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "fifo")
    (tmp_path / "data" / "a").write_bytes(b"text")
    assert read_documents([str(tmp_path / "data")], "*") == [b"text"]


def test_a_pipe_is_a_document(tmp_path):
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writer, b"piped"), os.close(writer)))
    thread.start()
    assert read_documents([f"/dev/fd/{reader}"], "*") == [b"piped"]
    thread.join()
    os.close(reader)


def test_more_text_than_memory_is_refused_before_it_is_read(tmp_path, capsys):
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 2**43)  # a file of holes
    assert "GiB" in refusal(capsys, tmp_path / "run", "--data", str(tmp_path / "huge"))


def test_what_cannot_be_read_is_not_left_out(tmp_path, capsys, monkeypatch):
    (tmp_path / "data" / "locked").mkdir(parents=True)
    (tmp_path / "data" / "a").write_bytes(b"text")
    scandir = os.scandir

    def refusing(path):  # as for a user who is not root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "Permission denied" in refusal(capsys, tmp_path / "run", "--data", str(tmp_path / "data"))


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    data, disk = tmp_path / "data", tmp_path / "disk"
    (data / "inner").mkdir(parents=True), disk.mkdir()
    (disk / "a.txt").write_bytes(b"elsewhere")
    (data / "inner" / "b.txt").write_bytes(b"here")
    (data / "alias.txt").symlink_to(data / "inner" / "b.txt")
    os.link(data / "inner" / "b.txt", data / "hard.txt")
    (data / "more").symlink_to(disk)
    (data / "inner" / "up").symlink_to(data)
    (disk / "back").symlink_to(data)
    assert sorted(read_documents([str(data)], "*")) == [b"elsewhere", b"here"]
    assert (
        read_documents([str(data), str(data / "more"), str(data / "alias.txt"), str(data)], "*.txt").count(b"here") == 1
    )
    assert read_documents([str(data)], "more/*.txt") == [b"elsewhere"]
    assert read_documents([str(data)], "**/inner/*") == [b"here"]
    assert read_documents([str(data)], "[am]*/[a]*") == [b"elsewhere"]


def test_names_are_no_patterns_and_need_no_encoding(tmp_path):
    for number, name in enumerate(["[a]*.txt", "a b", " ", os.fsdecode(b"\xff"), "-x", "$HOME"]):
        (tmp_path / name).write_bytes(bytes([65 + number]))
        assert read_documents([str(tmp_path / name)], "*") == [bytes([65 + number])]
    assert len(read_documents([str(tmp_path)], "*")) == 6


def test_data_given_twice_is_added(data, tmp_path, capsys):
    assert "nowhere" in refusal(capsys, tmp_path / "run", "--data", "nowhere", "--data", str(data))


def test_runs_are_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    for run in ("runs/old", "runs/now"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "sample.txt").write_bytes(b"sample")
    (tmp_path / "runs" / "old" / "metrics.jsonl").write_bytes(b"{}\n")
    assert read_documents([str(tmp_path)], "*", tmp_path / "runs" / "now") == [b"text"]
    with pytest.raises(ValueError, match="out: expected another folder"):
        read_documents([str(tmp_path)], "*", tmp_path)


def test_a_lone_document_gives_both_parts_something():
    for held_out in (1e-9, 0.5, 1 - 1e-9):
        assert all(split([b"ab"], held_out, seed=0))
    with pytest.raises(ValueError, match="at least two bytes"):
        split([b"a"], 0.5, seed=0)


def test_triton_without_a_gpu(data, tmp_path):
    given = [*arguments(implementation="triton"), "--data", str(data), "--out", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "nsa_jax.train", *given],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "implementation" in done.stderr and not (tmp_path / "run").exists()


def test_out_of_another_kind(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    given = [*arguments(), "--data", str(data)]
    for out in ("file", "file/below", "/dev/null", "/dev/null/below"):
        assert cli.main([*given, "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
