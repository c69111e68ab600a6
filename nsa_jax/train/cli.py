"""The command line: `nsa-train`."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

_NEEDED = {"flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "rich": "rich", "matplotlib": "matplotlib"}
_INSTALL = "pip install 'nsa-jax[train]'"

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
        0 when done, 2 after a message about bad input, 130 when interrupted, with a checkpoint written.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not installed; {_INSTALL}")
    asked = _parser().parse_args(arguments)
    try:
        config = _config(asked)
        folder = Path(asked.out or f"runs/{asked.preset}-{config.model.attention}")
        others = [Path(other) for other in asked.compare]
        run = _prepare(asked, config, folder, others)
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    if not run.train():
        return 130
    run.leave_results(others)
    return 0


def _refuse(message: str) -> int:
    print(f"nsa-train: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa-train", description="Train a language model with native sparse attention on the bytes of text files."
    )
    parser.add_argument("--preset", default="tiny", help="tiny (two CPU cores), small or 340m; options below change it")
    parser.add_argument(
        "--data", nargs="+", default=[], help="files and folders; the Python standard library by default"
    )
    parser.add_argument("--pattern", default="*", help="which files of a folder to read, such as '*.txt'")
    parser.add_argument(
        "--out", help="folder for checkpoints, metrics, plot and sample; runs/PRESET-ATTENTION by default"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    parser.add_argument("--devices", type=int, help="local devices to divide a batch over; all by default")
    parser.add_argument("--compare", nargs="+", default=[], help="folders of other runs to draw into the plot")
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


def _prepare(asked: argparse.Namespace, config, folder: Path, others: list[Path]):
    import jax
    from rich.console import Console

    from nsa_jax.train.documents import read_documents
    from nsa_jax.train.loop import Run
    from nsa_jax.train.metrics import read_metrics

    for other in others:
        read_metrics(other)
    devices = jax.local_devices()
    if asked.devices is not None and not 1 <= asked.devices <= len(devices):
        raise ValueError(f"devices: expected 1 to {len(devices)}, got {asked.devices}")
    documents = read_documents(asked.data, asked.pattern)
    return Run(
        config,
        documents,
        folder,
        devices=devices[: asked.devices],
        resume=asked.resume,
        console=Console(highlight=False),
    )
