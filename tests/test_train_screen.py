"""The screen: whatever it cannot show, and wherever it goes, costs no run."""

import io
import os
import signal
import subprocess
import sys

import pytest
from train_cases import arguments, write_data

import nsa_jax.train.cli as cli
from nsa_jax.train import report, screen, signals

ALL = "".join(map(chr, [*range(32), 127, 155, 233, 0x2028, 0x65E5, 0x1F600, 0xDCFF])) + "[/red] :smile: [b]"


class Failing(io.StringIO):
    """A stream that takes two writes."""

    def __init__(self, error):
        super().__init__()
        self.error, self.left = error, 2

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


def show_all(console):
    for _ in range(3):
        screen.say(console, ALL)
        report.show_sample(console, ALL)
    with report.progress_bar(console) as progress:
        progress.update(progress.add_task("", total=3, loss="-", speed="-"), completed=3)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_what_an_encoding_lacks_is_replaced(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    show_all(screen.open_console(stream))
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert "[/red] :smile: [b]" in shown and "sample" in shown and "training" in shown
    assert not {"\x1b", "\x9b", "\a", "\r"} & set(shown)


@pytest.mark.parametrize("columns", ["", "0", "1", "5", "999999999", "-3"])
@pytest.mark.parametrize("terminal", ["dumb", "", "xterm"])
def test_any_width(monkeypatch, columns, terminal):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", terminal)
    stream = io.StringIO()
    show_all(screen.open_console(stream))
    assert 0 < len(stream.getvalue()) < 100_000


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "pipe"), OSError(5, "gone"), OSError(28, "full"), ValueError("closed")], ids=repr
)
def test_a_stream_that_fails_is_left(error):
    stream = Failing(error)
    show_all(screen.open_console(stream))
    assert stream.left == -1


def test_no_stream_at_all():
    show_all(screen.open_console(None))


def test_a_hang_up_ends_nothing_and_handlers_come_back():
    usual = signal.getsignal(signal.SIGHUP)
    with signals.hang_ups_ignored():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is usual


def test_an_interrupt_before_the_first_step_is_one_line(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_config", interrupt)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "nsa-train: error: interrupted\n"


def test_a_terminal_that_goes_away_costs_no_run(tmp_path):
    (tmp_path / "data").mkdir()
    given = arguments(steps=30, eval_interval=5, checkpoint_interval=1000)
    run = subprocess.Popen(
        [sys.executable, "-m", "nsa_jax.train", *given, "--data", write_data(tmp_path / "data"), "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
    )
    while b"step 0:" not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()
    run.send_signal(signal.SIGHUP)
    with run.stderr:
        assert (run.stderr.read(), run.wait(timeout=300)) == (b"", 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["30"]
    assert (tmp_path / "sample.txt").exists()


def test_closed_standard_streams_are_filled():
    program = (
        "import os; from nsa_jax.train.screen import fill_standard_streams as fill; fill(); os._exit(os.dup(0) < 3)"
    )
    assert (
        subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, program], check=False).returncode == 0
    )
