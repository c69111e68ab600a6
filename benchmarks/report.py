"""The table of a benchmark."""

from collections.abc import Sequence
from typing import Any

from plan import Row
from results import Results, milliseconds, teraflops
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_TITLES = {
    "parts": "Parts",
    "long": "Long rows, at a fixed number of tokens",
    "decode": "Steps of decoding, and prefill",
    "original": "The sweep of the original's benchmark",
}
_DIRECTIONS = {"both": "fwd+bwd", "forward": "fwd", "backward": "bwd", "dq": "bwd: dq"}
_HAVE_DENSE = ("nsa", "nsa-paper", "nsa-given", "decode", "decode-paper", "prefill")
_USE_SELECTION = ("nsa", "nsa-given", "nsa-paper", "selection", "selection-paper", "selected", "fla-selected")
_LEGEND = (
    "ms: median device time of a call, ± its interquartile range. TFLOP/s: arithmetic over visible pairs only."
    " peak: share of the matrix product's rate, measured in the same way. dense: time of dense causal attention over"
    " this one. kernels: launches counted in the compiled program. temp: memory beyond arguments and results, in sizes"
    " of the query."
)


def print_report(console: Console, results: Results, rows: Sequence[Row], sweeps: Sequence[str]) -> None:
    """A table per sweep, of those of its rows that were measured or have failed."""
    run, settings = results.runs[-1], results.settings
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    day = run["date"][:10]
    console.print(f"{escape(settings['device'])}, {day}; {versions}; source {run['source']}", soft_wrap=True)
    for sweep in sweeps:
        listed = [row for row in rows if sweep in row.sweeps and row.key in results.rows]
        if sweep != "parts":
            listed.sort(key=lambda row: row.case.T)
        if listed:
            console.print(_table(sweep, listed, results))
    console.print(_LEGEND, style="dim")


def _table(sweep: str, rows: Sequence[Row], results: Results) -> Table:
    case = rows[0].case
    title = (
        f"{_TITLES[sweep]}: N={case.N}, H={case.H}, D={case.D}, S={case.S}, block {case.block_size},"
        f" window {case.window_size}, {case.dtype}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for name in ("T", "B"):
        table.add_column(name, justify="right")
    for name in ("what", "direction", "selection"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "±", "ns/token", "TFLOP/s", "peak", "dense", "kernels", "temp"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        last = row is rows[-1] or rows[rows.index(row) + 1].case.T != row.case.T
        table.add_row(*_cells(row, results), end_section=last)
    return table


def _cells(row: Row, results: Results) -> list[str]:
    case, taken = row.case, results.rows[row.key]
    selection = case.selection if row.provider in _USE_SELECTION else ""
    cells = [str(case.T), str(case.B), row.provider, _DIRECTIONS[row.direction], selection]
    if "error" in taken:
        return [*cells, *[""] * 8, f"[red]failed: {escape(taken['error'])}[/red]"]
    if row.provider == "first-step":
        return [*cells, *[""] * 8, _first_step(taken)]
    time, rate = milliseconds(taken), teraflops(taken)
    peak = teraflops(_measured(results, "ceiling-matmul", "forward"))
    dense = milliseconds(_dense(row, results)) if row.provider in _HAVE_DENSE else None
    return [
        *cells,
        _short(time),
        _short(taken["iqr_ms"]),
        "" if row.provider.startswith("ceiling") else _short(1e6 * time / (case.B * case.T)),
        _short(rate),
        f"{rate / peak:.0%}" if rate and peak else "",
        f"{dense / time:.2f}x" if dense else "",
        str(taken.get("kernels") or ""),
        f"{taken['temp_bytes'] / taken['query_bytes']:.2f}" if taken.get("temp_bytes") is not None else "",
        "; ".join([*_notes(taken), *_floor(taken, results)]),
    ]


def _measured(results: Results, provider: str, direction: str) -> dict[str, Any] | None:
    return next((row for key, row in results.rows.items() if key.startswith(f"{provider}/{direction}/")), None)


def _dense(row: Row, results: Results) -> dict[str, Any] | None:
    """The fastest dense attention on the same shape, whatever its data: its time does not depend on them."""
    shape = row.key.split("/")[2]
    providers = ("decode-cudnn", "decode-xla") if row.provider.startswith("decode") else ("dense",)
    found = [_measured(results, provider, f"{row.direction}/{shape}") for provider in providers]
    return min((x for x in found if milliseconds(x)), key=milliseconds, default=None)


def _floor(taken: dict[str, Any], results: Results) -> list[str]:
    """How much longer a step takes than to copy what it reads."""
    copy = _measured(results, "ceiling-copy", "forward")
    if "read_bytes" not in taken or not milliseconds(copy):
        return []
    floor = taken["read_bytes"] / copy["bytes"] * milliseconds(copy)
    return [f"{milliseconds(taken) / floor:.2f} times the copy of {taken['read_bytes'] / 1e6:.3g} MB"]


def _first_step(taken: dict[str, Any]) -> str:
    def told(step):
        return f"{sum(step.values()):.1f} s (trace {step['trace_s']:.1f}, compile {step['compile_s']:.1f})"

    return f"first process {told(taken['first'])}; with JAX's cache on disk {told(taken['second'])}"


def _notes(taken: dict[str, Any]) -> list[str]:
    notes = []
    if taken["chained_ms"] is not None:
        notes.append(f"inside a program; a call of its own is host-bound: {_short(taken['ms'])} ms")
    if "overlap" in taken:
        notes.append(f"overlap {taken['overlap']:.2f}")
    if "bytes" in taken:
        notes.append(f"{taken['bytes'] / milliseconds(taken) / 1e6:.0f} GB/s")
    return notes


def _short(number: float | None) -> str:
    """Three figures, as many decimals as that takes up to four."""
    if number is None:
        return ""
    decimals = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3 if number >= 0.1 else 4
    return f"{number:.{decimals}f}"
