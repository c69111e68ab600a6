"""Metrics as JSON lines, and the curves drawn from them."""

import io
import json
import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsa_jax.train import hosts
from nsa_jax.train.folder import METRICS as FILE
from nsa_jax.train.folder import write_whole
from nsa_jax.train.screen import printable


class MetricsLog:
    """Appends to metrics.jsonl of a run; of several hosts the first does.

    Args:
        folder: the run's.
        from_step: lines of later steps are dropped: the run goes on from a checkpoint that knows nothing of them.

    Attributes:
        dropped: how many lines that were.

    Raises:
        ValueError: the file is there and is not a run's.
    """

    def __init__(self, folder: Path, from_step: int):
        path = folder / FILE
        lines = read_metrics(folder) if path.exists() else []
        kept = [line for line in lines if line["step"] <= from_step]
        self.dropped = len(lines) - len(kept)
        if not hosts.is_first():
            path = Path(os.devnull)
        else:
            write_whole(path, "".join(map(_line, kept)).encode())
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, **values: Any) -> None:
        """One line."""
        self._file.write(_line(values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, but for one that was cut short when the run was killed.

    Raises:
        ValueError: a line is not a run's.
        OSError: there is no such file.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"metrics: no file {path}")
    return [_parse(line, f"{path}, line {n}") for n, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        [float(value + 0) for value in values.values()]
        if 0 <= operator.index(values["step"]) < 2**31:
            return values
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass  # whatever else JSON can hold
    shown = line[:40].decode("utf-8", "replace")
    raise ValueError(f"metrics: expected a step and numbers in {where}, got {shown!r}; mend it or move it away")


def plot_runs(path: Path, runs: Iterable[Path]) -> None:
    """A PNG of the training and held-out bits per byte of some runs, each a folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        lines = read_metrics(run)
        # no name begins with "_", which hides it, or holds a formula
        title = printable(run.absolute().name).replace("$", r"\$")
        for name, label, style in (
            ("bits_per_byte", "training", {"alpha": 0.45, "linewidth": 1}),
            ("held_out_bits_per_byte", "held out", {"marker": "o", "markersize": 3}),
        ):
            points = [(line["step"], line[name]) for line in lines if name in line] or [(math.nan, math.nan)]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=f"{label}, {title}", **style)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())
