"""What Native Sparse Attention gains over what would run in its place, measured on the GPU that is here.

    python benchmarks/benchmark_nsa.py

Every row is kept as soon as it is measured: the same command goes on after a budget, an interrupt or a crash.
"""

import argparse
import datetime
import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan import FULL, SMOKE, SWEEPS, Row, rows
from protocol import WorkerError
from results import Results, milliseconds
from session import LOG, Session

_NEEDED = ("jax", "nsa_jax", "matplotlib", "rich")
_TABLE_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 when done or out of budget, 1 when every row failed, 2 after a message about bad input, 130 when interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not installed; pip install -e '.[bench,cuda13]'")
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        return _run(asked, [parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    except (ValueError, OSError) as error:
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"benchmark_nsa: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(_refuse(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmark_nsa.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu is a smoke test at tiny sizes")
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which tables to fill; all by default"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN",
        help="rows to measure, such as 'selected/*' or '*/both/B1-T65536-*'; see --list",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument(
        "--implementation", choices=("triton", "xla"), help="of nsa_jax; triton on a GPU, xla on a CPU by default"
    )
    parser.add_argument(
        "--overlap", type=float, default=FULL.base.overlap,
        help="of realistic selections: distinct blocks of 4 neighbouring tokens over the sum of their picks,"
        " above 0.25 and below 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="stop in time for this")
    parser.add_argument(
        "--row-timeout", type=float, default=180.0, metavar="SECONDS", help="limit on one row (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/DEVICE-DATE by default")
    parser.add_argument("--fresh", action="store_true", help="measure again what the folder already holds")
    parser.add_argument("--fla-python", help="an interpreter with torch and fla-core; this one if it has them")
    return parser


def _run(asked: argparse.Namespace, command: list[str]) -> int:
    from rich.console import Console

    _check(asked)
    smoke = asked.device == "cpu"
    scale = SMOKE if smoke else FULL
    scale = replace(scale, base=replace(scale.base, overlap=asked.overlap))
    fla_python = asked.fla_python or sys.executable
    fla = bool(asked.fla_python) or all(importlib.util.find_spec(name) for name in ("torch", "fla"))
    planned = rows(scale, asked.sweep, asked.only, fla)
    if not planned:
        raise ValueError(f"--only: no row matches {' '.join(asked.only)}; see --list")
    if asked.list:
        print("\n".join(row.key for row in planned))
        return 0

    parent = asked.out or Path(__file__).parent / "results"
    parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    session = Session(
        smoke=smoke, log=parent / LOG, row_seconds=asked.row_timeout, budget=asked.budget, fla_python=fla_python
    )
    try:
        facts = _device(session, smoke)
        implementation = asked.implementation or ("xla" if smoke else "triton")
        settings = {
            "device": facts.pop("device"), "smoke": smoke, "implementation": implementation, "overlap": asked.overlap,
        }  # fmt: skip
        folder = asked.out or parent / _folder_name(settings["device"])
        results = Results(folder, settings, {"command": shlex.join(command), **facts}, asked.fresh)
        session.move_log(folder / LOG)
        interrupted = _measure(session, planned, implementation, results, console)
    finally:
        session.close()
        session.drop_empty_log()
    # rows of another library that an earlier run measured are shown even if this one can't measure them
    _report(results, rows(scale, asked.sweep, asked.only, fla=True), asked.sweep, folder, console)
    if interrupted:
        return 130
    measured = [results.rows[row.key] for row in planned if row.key in results.rows]
    return 1 if measured and all("error" in row for row in measured) else 0


def _check(asked: argparse.Namespace) -> None:
    if not 0.25 < asked.overlap < 1:
        raise ValueError(f"--overlap: expected a number above 0.25 and below 1, got {asked.overlap}")
    for name in ("budget", "row_timeout"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(asked, name)}")


def _device(session: Session, smoke: bool) -> dict[str, Any]:
    try:
        return session.hello()
    except WorkerError as error:
        hint = "" if smoke else " (--device cpu is a smoke test that needs no GPU)"
        raise ValueError(f"--device: no {'CPU' if smoke else 'GPU'} that JAX can use: {error}{hint}") from None


def _folder_name(device: str) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{datetime.date.today()}"


def _measure(session: Session, planned: list[Row], implementation: str, results: Results, console) -> bool:
    """Measures what is not there yet, with a bar; whether it was interrupted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    waiting = [row for row in planned if not results.is_done(row.key)]
    kept = len(planned) - len(waiting)
    columns = TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(planned), completed=kept)

        def done(row, result):
            time = milliseconds(result)
            progress.console.print(
                f"{row.key}  {result.get('error') or ('done' if time is None else f'{time:.4g} ms')}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
            progress.advance(task)

        try:
            left = session.measure(waiting, implementation, results, done)
        except KeyboardInterrupt:
            console.print("interrupted: what was measured is kept; the same command goes on")
            return True
    if left:
        console.print(f"out of budget: {len(left)} of {len(planned)} rows left; the same command goes on with them")
    return False


def _report(results: Results, known: list[Row], sweeps: Sequence[str], folder: Path, console) -> None:
    from plots import save_plots
    from report import print_report
    from rich.console import Console

    screen = Console(highlight=False)
    screen.width = max(screen.width, _TABLE_WIDTH)
    print_report(screen, results, known, sweeps)
    with (folder / "table.txt").open("w") as file:
        print_report(Console(file=file, width=_TABLE_WIDTH, highlight=False), results, known, sweeps)
    written = save_plots(folder, results, known)
    console.print(f"{folder}: results.json, table.txt{''.join(f', {path.name}' for path in written)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
