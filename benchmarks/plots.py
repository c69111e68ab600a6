"""The plots of a benchmark: time over T, speed-up over dense attention over T, share of the peak rate by part."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from plan import Row
from results import Results, milliseconds, teraflops

# colours that are told apart with any colour vision
_COLOURS = {"nsa": "#0072B2", "nsa-given": "#56B4E9", "dense": "#D55E00"}
_NAMES = {
    "nsa": "NSA, three branches",
    "nsa-given": "NSA, given blocks + window",
    "dense": "dense causal",
    "cudnn-window": "windowed",
    "sliding": "sliding",
    "compressed": "compressed",
    "compressed-paper": "compressed",
    "selection": "selection",
    "selection-paper": "selection",
    "selected": "selected",
}
_STEPS = {
    "decode": ("NSA", "-", "#0072B2"),
    "decode-paper": ("NSA, l=32 d=16", "--", "#56B4E9"),
    "decode-cudnn": ("dense, cuDNN", "-", "#D55E00"),
    "decode-xla": ("dense, XLA", "--", "#E69F00"),
}
_LIBRARY = ("dense", "cudnn-window")
_LIBRARIES = {"triton": "cuDNN", "xla": "XLA"}
_DIRECTIONS = {"forward": "forward", "both": "forward + backward"}
_LINES = {"forward": ("--", "o"), "both": ("-", "s")}
_INK = "#333333"
_BASELINE = ("speedup.png", "dense")  # a plain line there


def save_plots(folder: Path, results: Results, rows: Sequence[Row]) -> list[Path]:
    """Writes time.png, speedup.png and share.png, of each what there are figures for; the files written."""
    over_length = {
        sweep: panel
        for sweep in ("original", "long")
        if (panel := [r for r in rows if sweep in r.sweeps and r.provider in _COLOURS and _time(results, r)])
    }
    written = []
    for name, draw in (("time.png", _draw_times), ("speedup.png", _draw_speedups)):
        if over_length:
            figure = Figure(figsize=(max(6.4, 5.2 * len(over_length)), 4.8), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.12)
            axes = figure.subplots(1, len(over_length), squeeze=False)[0]
            for (sweep, panel), ax in zip(over_length.items(), axes, strict=True):
                draw(ax, results, panel, sweep)
            drawn = {row.provider for panel in over_length.values() for row in panel}
            shown = [p for p in _COLOURS if p in drawn and (name, p) != _BASELINE]
            handles = _legend(shown, results.settings["implementation"])
            figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
            written.append(_save(figure, folder / name, results))
    parts = [r for r in rows if "parts" in r.sweeps and r.provider in _NAMES and r.direction in ("forward", "backward")]
    if figure := _shares(results, parts):
        written.append(_save(figure, folder / "share.png", results))
    steps = [r for r in rows if r.provider in _STEPS and _time(results, r)]
    if steps:
        written.append(_save(_draw_steps(results, steps), folder / "decode.png", results))
    return written


def _draw_steps(results: Results, rows: Sequence[Row]) -> Figure:
    """Time of a step over the length of the rows, a panel per number of rows."""
    batches = sorted({row.case.B for row in rows})
    figure = Figure(figsize=(3.4 * len(batches) + 1, 4.4), layout="constrained")
    for ax, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        panel = [row for row in rows if batch == row.case.B]
        for provider, (name, style, colour) in _STEPS.items():
            points = [(r.case.T, 1e3 * _time(results, r)) for r in panel if r.provider == provider]
            if points:
                ax.plot(*_sorted(points), style, marker="o", markersize=4, color=colour, label=name)
        _length_axis(ax, panel, "decode")
        ax.set_yscale("log")
        ax.set_title(f"B={batch}", fontsize=10, loc="left", color=_INK)
        ax.set_ylabel("µs per layer and step")
        ax.legend(fontsize=8, frameon=False)
    return figure


def _legend(providers: Sequence[str], implementation: str) -> list[Line2D]:
    """A colour per provider, a line style per direction."""
    colours = [
        Line2D([], [], color=_COLOURS[provider], linewidth=3, label=_name(provider, implementation))
        for provider in providers
    ]
    styles = [
        Line2D([], [], color=_INK, linestyle=style, marker=marker, markersize=4, label=_DIRECTIONS[direction])
        for direction, (style, marker) in _LINES.items()
    ]
    return colours + styles


def _time(results: Results, row: Row) -> float | None:
    return milliseconds(results.rows.get(row.key))


def _save(figure: Figure, path: Path, results: Results) -> Path:
    smoke = ", smoke sizes" if results.settings["smoke"] else ""
    figure.suptitle(f"{results.settings['device']}, {results.runs[-1]['date'][:10]}{smoke}", fontsize=10, color=_INK)
    figure.savefig(path, dpi=150)
    return path


def _draw_times(ax: Axes, results: Results, rows: Sequence[Row], sweep: str) -> None:
    # on the long sweep per as many tokens as most rows have, so that what is seen is the growth with T
    tokens = _fewest_tokens(rows)
    for provider, colour in _COLOURS.items():
        for direction, (style, marker) in _LINES.items():
            points = [
                (r.case.T, _time(results, r) * (1 if sweep == "original" else tokens / (r.case.B * r.case.T)))
                for r in rows
                if (r.provider, r.direction) == (provider, direction)
            ]
            ax.plot(*_sorted(points), style, marker=marker, markersize=4, color=colour)
    _length_axis(ax, rows, sweep)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("ms" if sweep == "original" else f"ms per {tokens:,} tokens")


def _fewest_tokens(rows: Sequence[Row]) -> int:
    return min(row.case.B * row.case.T for row in rows)


def _draw_speedups(ax: Axes, results: Results, rows: Sequence[Row], sweep: str) -> None:
    times = {(r.provider, r.direction, r.case.T): _time(results, r) for r in rows}
    for provider in ("nsa", "nsa-given"):
        for direction, (style, marker) in _LINES.items():
            points = [
                (T, times["dense", d, T] / time)
                for (p, d, T), time in times.items()
                if (p, d) == (provider, direction) and ("dense", d, T) in times
            ]
            ax.plot(*_sorted(points), style, marker=marker, markersize=4, color=_COLOURS[provider])
    ax.axhline(1, color=_COLOURS["dense"], linewidth=1)
    ax.annotate(
        "dense causal", (1, 1), (-4, -4), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8, color=_COLOURS["dense"], ha="right", va="top",
    )  # fmt: skip
    _length_axis(ax, rows, sweep)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    ax.set_ylabel("times faster than dense")


def _sorted(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _length_axis(ax: Axes, rows: Sequence[Row], sweep: str) -> None:
    lengths = sorted({row.case.T for row in rows})
    case = rows[0].case
    shape = f"B={case.B}" if sweep == "original" else f"B·T={_fewest_tokens(rows):,}"
    ax.set_title(f"{shape}, window {case.window_size}", fontsize=10, loc="left", color=_INK)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{T // 1024}k" if T >= 1024 else str(T) for T in lengths])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("T, tokens of a row")
    _clean(ax, "both")


def _clean(ax: Axes, grid: str) -> None:
    ax.grid(axis=grid, alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=_INK, which="both", labelsize=9)


def _shares(results: Results, rows: Sequence[Row]) -> Figure | None:
    peak = next((teraflops(row) for key, row in results.rows.items() if key.startswith("ceiling-matmul/")), None)
    bars = [
        (row, rate) for row in rows if row.provider != "nsa" and (rate := teraflops(results.rows.get(row.key))) and peak
    ]
    if not bars:
        return None
    order = list(_NAMES)
    bars = [(_bar_name(row, results.settings["implementation"]), row, rate) for row, rate in bars]
    bars.sort(key=lambda bar: order.index(bar[1].provider))
    names = list(dict.fromkeys(name for name, _, _ in bars))
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(names)), layout="constrained")
    ax = figure.subplots()
    colours = {"forward": "#009E73", "backward": "#CC79A7"}
    for direction, shift in (("forward", -0.19), ("backward", 0.19)):
        mine = [(names.index(name) + shift, rate / peak) for name, row, rate in bars if row.direction == direction]
        places, shares = zip(*mine, strict=True) if mine else ((), ())
        drawn = ax.barh(places, shares, height=0.36, color=colours[direction], label=direction)
        ax.bar_label(drawn, [f"{share:.0%}" if share >= 0.01 else "<1%" for share in shares], padding=3, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    case = bars[0][1].case
    ax.set_xlabel(f"share of the measured matrix-product rate, {peak:.3g} TFLOP/s; B={case.B}, T={case.T}")
    _clean(ax, "x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bar_name(row: Row, implementation: str) -> str:
    name = _name(row.provider, implementation)
    if row.provider.endswith("-paper"):
        name += f", l={row.case.window} d={row.case.stride}"
    return f"{name} ({row.case.selection})" if row.provider in ("selected", "selection") else name


def _name(provider: str, implementation: str) -> str:
    return _NAMES[provider] + (f", {_LIBRARIES[implementation]}" if provider in _LIBRARY else "")
