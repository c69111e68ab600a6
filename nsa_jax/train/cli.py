"""The command line: `nsa-train`."""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa_jax.train import command

# options that change a field of the preset, by name: type and help
_MODEL_OPTIONS = {
    "attention": (str, "nsa or dense"),
    "hidden_size": (int, "width of the model"),
    "num_layers": (int, "layers"),
    "num_heads": (int, "query heads"),
    "num_kv_heads": (int, "key and value heads"),
    "head_dim": (int, "width of a head"),
    "block_size": (int, "tokens of a selection block"),
    "block_counts": (int, "blocks that each query selects"),
    "window_size": (int, "tokens of the sliding window"),
    "compression": (str, "mean or mlp"),
    "compression_window": (int, "tokens of a compression window"),
    "compression_stride": (int, "tokens from one compression window to the next"),
    "implementation": (str, "triton or xla; by device unless given"),
    "dtype": (str, "of the computation: bfloat16 (on a GPU unless given) or float32"),
}
_RUN_OPTIONS = {
    "sequence_length": (int, "tokens of a row"),
    "batch_size": (int, "rows of a step, over all devices"),
    "steps": (int, "optimiser steps"),
    "learning_rate": (float, "AdamW's, at its peak"),
    "warmup_steps": (int, "steps of linear warm-up"),
    "weight_decay": (float, "AdamW's"),
    "clip_norm": (float, "largest global norm of a gradient"),
    "seed": (int, "of parameters, data order and held-out split"),
    "held_out": (float, "fraction of the documents held out"),
    "eval_rows": (int, "rows of held-out text to evaluate"),
    "eval_interval": (int, "steps from one evaluation to the next"),
    "checkpoint_interval": (int, "steps from one checkpoint to the next"),
    "sample_bytes": (int, "bytes of text to generate at the end"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains.

    Returns:
        0 when done, 1 after a message about what ended the run (a number that is not finite, a full disk), 2 after a
        message about bad input, 130 when interrupted, with a checkpoint written.
    """
    if missing := command.missing_packages():
        return _fail(missing, 2)
    from nsa_jax.train import screen, signals

    screen.fill_standard_streams()
    with signals.hang_ups_ignored(), command.quiet_libraries():
        try:
            return _run(arguments, screen.open_console(sys.stdout))
        except KeyboardInterrupt:
            return _fail("interrupted", 130)


_fail = functools.partial(command.fail, "nsa-train")


def _run(arguments: Sequence[str] | None, console) -> int:
    from jax.errors import JaxRuntimeError

    from nsa_jax.train import hosts, mesh

    try:
        asked = _parser().parse_args(arguments)
        _refuse_empty(asked)
        asked.mesh = None if asked.mesh is None else mesh.parse_mesh(asked.mesh)
        hosts.join()
        console.quiet = not hosts.is_first()
        config = _config(asked)
        folder = Path(asked.out or f"runs/{asked.preset}-{config.model.attention}")
        others = [Path(other) for other in asked.compare]
        run = _prepare(asked, config, folder, others, console)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 2)
    with contextlib.closing(run):
        try:
            if not run.train():
                return 130
            run.leave_results(others)
        except (FloatingPointError, OSError, ValueError, JaxRuntimeError) as error:
            return _fail(error, 1)
    return 0


def _refuse_empty(asked: argparse.Namespace) -> None:
    """What an unset variable of a shell leaves is neither the current folder nor the default."""
    for name in ("data", "out", "compare"):
        given = getattr(asked, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value.strip():
                raise ValueError(f"{name}: expected a file or folder, got {value!r}")


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="nsa-train", description="Train a language model with native sparse attention on the bytes of text files."
    )
    parser.add_argument("--preset", default="tiny", help="tiny (two CPU cores), small or 340m; options below change it")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        help="files and folders, each file read once, runs in them left out; the Python standard library by default",
    )
    parser.add_argument("--pattern", default="*", help="which files of a folder to read, such as '*.txt'")
    parser.add_argument(
        "--out", help="folder for checkpoints, metrics, plot and sample; runs/PRESET-ATTENTION by default"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    parser.add_argument("--devices", type=int, help="how many devices to use; all by default")
    parser.add_argument(
        "--mesh",
        help="how the devices share the work, such as data=2,fsdp=2,tensor=2: rows; rows, parameters and optimiser;"
        " heads and MLP. All along data by default",
    )
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], help="folders of other runs to draw into the plot"
    )
    for title, options in (("model", _MODEL_OPTIONS), ("training", _RUN_OPTIONS)):
        group = parser.add_argument_group(title)
        for name, (kind, text) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--separate-keys", action="store_true", default=None, help="keys and values for each branch")
    return parser


def _config(asked: argparse.Namespace):
    import jax
    import jax.numpy as jnp

    from nsa_jax.train.config import PRESETS

    if asked.preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {asked.preset!r}")
    if asked.dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"dtype: expected bfloat16 or float32, got {asked.dtype!r}")
    given = {name: value for name, value in vars(asked).items() if value is not None}
    dtype = given.pop("dtype", "bfloat16" if jax.default_backend() == "gpu" else "float32")
    preset = PRESETS[asked.preset]
    model_fields = {name: given[name] for name in (*_MODEL_OPTIONS, "separate_keys") if name in given}
    model = dataclasses.replace(preset.model, dtype=jnp.dtype(dtype), **model_fields)
    return dataclasses.replace(preset, model=model, **{name: given[name] for name in _RUN_OPTIONS if name in given})


def _prepare(asked: argparse.Namespace, config, folder: Path, others: list[Path], console):
    import jax

    from nsa_jax.train.documents import read_documents
    from nsa_jax.train.loop import Run
    from nsa_jax.train.metrics import read_metrics

    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"out: {folder} cannot be written, {there} is {'read-only' if there.is_dir() else 'a file'}")
    for other in others:
        read_metrics(other)
    devices = jax.devices()
    if jax.process_count() > 1 and asked.devices not in (None, len(devices)):
        raise ValueError(f"devices: expected all {len(devices)} of several hosts, got {asked.devices}")
    if asked.devices is not None and not 1 <= asked.devices <= len(devices):
        raise ValueError(f"devices: expected 1 to {len(devices)}, got {asked.devices}")
    documents = read_documents(asked.data, asked.pattern, folder)
    return Run(
        config,
        documents,
        folder,
        devices=devices[: asked.devices],
        mesh=asked.mesh,
        resume=asked.resume,
        console=console,
    )
