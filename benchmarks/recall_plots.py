"""The plots of a recall experiment."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from recall_arms import ARMS

# colours that are told apart with any colour vision
_COLOURS = dict(zip(ARMS, ("#D55E00", "#0072B2", "#56B4E9", "#999999", "#009E73"), strict=True))


def save_plots(folder: Path, runs: Sequence[dict[str, Any]]) -> list[Path]:
    """Writes loss.png, accuracy.png, selection.png where blocks are selected, and depth.png of needles."""
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    written = [_save(_losses(runs, arms), folder / "loss.png"), _save(_accuracies(runs, arms), folder / "accuracy.png")]
    selecting = [arm for arm in arms if any(run["selection_recall"] for run in runs if run["arm"] == arm)]
    if selecting:
        written.append(_save(_selections(runs, selecting), folder / "selection.png"))
    if any("depth" in line for run in runs for line in run["accuracy"]):
        written.append(_save(_depths(runs, arms), folder / "depth.png"))
    return written


def mean_over(lines: Iterable[dict[str, Any]], value: str, **where: Any) -> float:
    """The mean of a field over the lines that have these values in other fields; NaN without one."""
    found = [line[value] for line in lines if all(line[name] == wanted for name, wanted in where.items())]
    return float(np.mean(found)) if found else float("nan")


def values_of(runs: Sequence[dict[str, Any]], table: str, field: str) -> list[Any]:
    """The values of a field in a table of all runs, ascending."""
    return sorted({line[field] for run in runs for line in run[table]})


def _losses(runs, arms) -> Figure:
    figure, (ax,) = _panels(1)
    for arm in arms:
        for run in (run for run in runs if run["arm"] == arm):
            label = arm if run is next(other for other in runs if other["arm"] == arm) else None
            ax.plot(*zip(*run["loss"], strict=True), color=_COLOURS[arm], linewidth=1, label=label)
    ax.set(xlabel="step", ylabel="loss of answers (nats)", yscale="log")
    ax.legend(frameon=False)
    return figure


def _accuracies(runs, arms) -> Figure:
    lengths, counts = values_of(runs, "accuracy", "length"), values_of(runs, "accuracy", "count")
    figure, axes = _panels(2 if len(counts) > 1 else 1)
    _lines(axes[0], runs, arms, lengths, lambda run, x: mean_over(run["accuracy"], "accuracy", length=x))
    axes[0].set(xlabel="tokens of a segment", ylabel="accuracy", title="mean over counts" if len(counts) > 1 else None)
    if len(counts) > 1:
        most = max(lengths)
        at_most = lambda run, x: mean_over(run["accuracy"], "accuracy", length=most, count=x)  # noqa: E731
        _lines(axes[1], runs, arms, counts, at_most)
        axes[1].set(xlabel="count", title=f"{most} tokens")
    axes[0].legend(frameon=False)
    return figure


def _selections(runs, arms) -> Figure:
    lengths, layers = values_of(runs, "selection_recall", "length"), values_of(runs, "selection_recall", "layer")
    figure, axes = _panels(len(layers))
    for ax, layer in zip(axes, layers, strict=True):
        of_layer = lambda run, x, layer=layer: mean_over(run["selection_recall"], "recall", length=x, layer=layer)  # noqa: E731
        _lines(ax, runs, arms, lengths, of_layer)
        ax.set(xlabel="tokens of a segment", title=f"layer {layer}")
    axes[0].set_ylabel("answer's block is selected")
    axes[0].legend(frameon=False)
    return figure


def _depths(runs, arms) -> Figure:
    lengths, depths = values_of(runs, "accuracy", "length"), values_of(runs, "accuracy", "depth")
    figure, axes = _panels(len(arms))
    for ax, arm in zip(axes, arms, strict=True):
        lines = [line for run in runs if run["arm"] == arm for line in run["accuracy"]]
        grid = [[mean_over(lines, "accuracy", length=length, depth=depth) for length in lengths] for depth in depths]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        ax.set_xticks(range(len(lengths)), [f"{length}" for length in lengths], rotation=45)
        ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        ax.set(title=arm, xlabel="tokens")
    axes[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(axes), label="accuracy")
    return figure


def _lines(ax: Axes, runs, arms, xs: Sequence[int], of: Callable[[dict, int], float]) -> None:
    """A line per arm, the mean of its seeds, in a band from the least to the most of them."""
    for arm in arms:
        seeds = np.array([[of(run, x) for x in xs] for run in runs if run["arm"] == arm])
        ax.plot(xs, seeds.mean(0), "o-", color=_COLOURS[arm], label=arm, markersize=4)
        ax.fill_between(xs, seeds.min(0), seeds.max(0), color=_COLOURS[arm], alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, [f"{x}" for x in xs], rotation=45)
    ax.minorticks_off()
    ax.set_ylim(-0.03, 1.03)


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.2 + 3.6 * count, 3.8), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
