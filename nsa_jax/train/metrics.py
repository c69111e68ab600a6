"""Metrics as JSON lines, and the curves drawn from them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to metrics.jsonl of a run.

    Args:
        folder: the run's.
        from_step: lines of later steps are dropped: the run goes on from a checkpoint that knows nothing of them.
    """

    def __init__(self, folder: Path, from_step: int):
        path = folder / FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= from_step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(map(_line, kept)))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        """One line."""
        self._file.write(_line(values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, but for one that was cut short when the run was killed."""
    text = (folder / FILE).read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def plot_runs(path: Path, runs: Iterable[Path]) -> None:
    """A PNG of the training and held-out bits per byte of some runs, each a folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        lines = read_metrics(run)
        for name, label, style in (
            ("bits_per_byte", "training", {"alpha": 0.45, "linewidth": 1}),
            ("held_out_bits_per_byte", "held out", {"marker": "o", "markersize": 3}),
        ):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=f"{run.name}, {label}", **style)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
