"""Does a model with Native Sparse Attention remember? Trains small models on recall tasks, arm against arm.

    python benchmarks/recall.py --task mqar

Every run is kept as soon as it is done: the same command goes on after an interrupt, and more seeds add to the folder.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recall_arms import ARMS
from recall_tasks import TASKS

_NEEDED = ("optax", "matplotlib", "rich")
FILE = "results.json"
_TEXT_BYTES = 16 << 20  # of the standard library's sources, in which needles are hidden


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Returns:
        0 when done or out of budget, 2 after a message about bad input, 130 when interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not installed; pip install -e '.[bench,train]'")
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        planned = _plan(asked)
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    return _run(asked, *planned, shlex.join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)]))


def _refuse(message: str) -> int:
    print(f"recall: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recall.py", description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--size", choices=("toy", "gpu"), help="toy on a CPU, gpu on a GPU by default")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS",
        help="stop in time for this: the runs that are left share what is left, and a run that its share does not"
        " suffice for takes fewer steps, which the results tell",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="fields of the experiment or of its model, such as steps=500 block_size=32 compression=mlp",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/recall-TASK-SIZE by default")
    parser.add_argument("--fresh", action="store_true", help="drop what the folder already holds")
    return parser


def _plan(asked: argparse.Namespace) -> tuple[Any, Path, dict[str, Any]]:
    """(size, folder, what the folder's file holds)."""
    import jax
    from recall_sizes import SIZES

    for name in ("seeds", "budget"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(asked, name)}")
    name = asked.size or ("toy" if jax.default_backend() == "cpu" else "gpu")
    size = _changed(SIZES[name][asked.task], asked.set)
    folder = asked.out or Path(__file__).parent / "results" / f"recall-{asked.task}-{name}"
    return size, folder, _opened(folder / FILE, {"task": asked.task, **_plain(size)}, asked.fresh)


def _run(asked: argparse.Namespace, size, folder: Path, content: dict[str, Any], command: str) -> int:
    import jax
    from rich.console import Console

    begin = time.monotonic()
    console = Console(highlight=False)
    done = {(run["arm"], run["seed"]) for run in content["runs"]}
    waiting = [(arm, seed) for seed in range(asked.seeds) for arm in asked.arms if (arm, seed) not in done]
    text = _text() if asked.task == "needle" else None
    facts = {"command": command, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    interrupted = False
    try:
        for number, (arm, seed) in enumerate(waiting):
            now = time.monotonic()
            share = (begin + asked.budget - now) / (len(waiting) - number)
            if share <= 0:
                console.print(f"out of budget: {len(waiting) - number} runs left; the same command goes on with them")
                break
            run = _one(asked.task, arm, size, seed, text, now + share, console)
            content["runs"].append({"arm": arm, "seed": seed, **run, **facts})
            _write(folder / FILE, content)
    except KeyboardInterrupt:
        console.print("interrupted: finished runs are kept; the same command goes on")
        interrupted = True
    if content["runs"]:
        _report(content["runs"], folder, console)
    return 130 if interrupted else 0


def _one(task: str, arm: str, size, seed: int, text, until: float, console) -> dict[str, Any]:
    """Trains and measures one arm with one seed; four fifths of the time at most are for training."""
    from recall_run import Run
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    begin = time.monotonic()
    name, loss = TextColumn("{task.description}"), TextColumn("loss {task.fields[loss]}")
    losses = []
    with Progress(
        name, BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        bar = progress.add_task(f"{arm}, seed {seed}", total=size.steps, loss="")
        run = Run(task, arm, size, seed, text)
        for steps, nats in run.train(begin + 0.8 * (until - begin)):
            losses.append((steps, nats))
            progress.update(bar, completed=steps, loss=f"{nats:.3f}")
        trained = time.monotonic()
        progress.update(bar, description=f"{arm}, seed {seed}: measuring")
        figures = run.evaluate()
    accuracy = sum(line["accuracy"] for line in figures["accuracy"]) / len(figures["accuracy"])
    cut = "" if losses[-1][0] == size.steps else f" of {size.steps}, out of time"
    console.print(
        f"{arm}, seed {seed}: accuracy {accuracy:.3f}, loss {losses[-1][1]:.3f} after {losses[-1][0]} steps{cut},"
        f" {time.monotonic() - begin:.0f} s"
    )
    seconds = {"train_seconds": round(trained - begin, 1), "eval_seconds": round(time.monotonic() - trained, 1)}
    return {"steps": losses[-1][0], "loss": losses, **seconds, **figures}


def _changed(size, changes: Sequence[str]):
    """The size with fields of its own or of its model changed, each "name=value"."""
    own, model = {field.name for field in dataclasses.fields(size)}, {f.name for f in dataclasses.fields(size.model)}
    for change in changes:
        name, equals, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if not equals or name not in (own | model) - {"model", "symbols", "vocab_size", "dtype", "param_dtype"}:
            raise ValueError(f"--set: expected NAME=VALUE of {', '.join(sorted(own | model))}, got {change!r}")
        if name in own:
            size = dataclasses.replace(size, **{name: value})
        else:
            size = dataclasses.replace(size, model=dataclasses.replace(size.model, **{name: value}))
    for name in ("steps", "rows", "eval_batches"):
        if not (isinstance(getattr(size, name), int) and getattr(size, name) > 0):
            raise ValueError(f"--set: {name}: expected a positive integer, got {getattr(size, name)!r}")
    for length in size.lengths:
        if size.row_length % length:
            raise ValueError(f"--set: lengths: expected divisors of row_length={size.row_length}, got {length}")
    return size


def _plain(size) -> dict[str, Any]:
    """The size as JSON gives it back."""
    import jax.numpy as jnp

    fields = dataclasses.asdict(size)
    fields["symbols"] = size.symbols._asdict()
    for name in ("dtype", "param_dtype"):
        fields["model"][name] = jnp.dtype(fields["model"][name]).name
    return json.loads(json.dumps(fields))


def _opened(path: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    if fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {"settings": settings, "runs": []}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        differ = sorted(name for name in settings if content["settings"].get(name) != settings[name])
        raise ValueError(f"{path}: measured with other {', '.join(differ)}; give --fresh or another --out")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    written = path.with_suffix(".part")
    written.write_text(json.dumps(content, indent=1))
    written.replace(path)


def _text():
    """uint8 [n], text that is on every machine."""
    import jax.numpy as jnp
    import numpy as np

    from nsa_jax.train.documents import read_documents

    return jnp.asarray(np.frombuffer(b"\n".join(read_documents([], "*.py"))[:_TEXT_BYTES], np.uint8))


def _report(runs: Sequence[dict[str, Any]], folder: Path, console) -> None:
    """A table on screen and in table.txt, and the plots."""
    from recall_plots import mean_over, save_plots, values_of
    from rich.console import Console
    from rich.table import Table

    lengths = values_of(runs, "accuracy", "length")
    table = Table("arm", "seeds", *(f"{length} tokens" for length in lengths), "selected, by layer")
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        if not own:
            continue
        cells = []
        for length in lengths:
            seeds = [mean_over(run["accuracy"], "accuracy", length=length) for run in own]
            cells.append(
                f"{sum(seeds) / len(seeds):.3f}" + (f" ({min(seeds):.3f}..{max(seeds):.3f})" if seeds[1:] else "")
            )
        lines = [line for run in own for line in run["selection_recall"]]
        layers = sorted({line["layer"] for line in lines})
        found = (f"{mean_over(lines, 'recall', layer=layer, length=lengths[-1]):.2f}" for layer in layers)
        table.add_row(arm, str(len(own)), *cells, " ".join(found))
    console.print(table)
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=160, highlight=False).print(table)
    names = ", ".join(path.name for path in save_plots(folder, runs))
    console.print(f"{folder}: {FILE}, table.txt, {names}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
