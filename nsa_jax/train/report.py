"""What a run shows on screen."""

import resource
import statistics
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from nsa_jax.linen import TransformerConfig
from nsa_jax.runtime.device import on_nvidia_gpu
from nsa_jax.train.folder import PLOT
from nsa_jax.train.metrics import read_metrics
from nsa_jax.train.screen import printable, say


def progress_bar(console: Console) -> Progress:
    """A bar with the fields loss and speed, the steps done, the time gone and the time left."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def describe_attention(model: TransformerConfig) -> str:
    """Which attention runs, through what, on what."""
    device = jax.devices()[0]
    triton = model.implementation == "triton" or (model.implementation is None and on_nvidia_gpu())
    name = {"nsa": "NSA", "dense": "dense attention"}[model.attention]
    return f"{name} through {'Triton kernels' if triton else 'jnp (XLA)'} on {device.device_kind}"


def show_sample(console: Console, text: str) -> None:
    """Generated text in a frame."""
    console.print(Panel(Text(printable(text)), title="sample", title_align="left"))


def show_summary(console: Console, folder: Path) -> None:
    """The run's final figures, from its metrics."""
    lines = read_metrics(folder)
    held_out = [line["held_out_bits_per_byte"] for line in lines if "held_out_bits_per_byte" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    parts = [f"held out {held_out[-1]:.3f} bits per byte"] if held_out else []
    parts += [f"{statistics.median(speeds):,.0f} tokens/s"] if speeds else []
    say(console, ", ".join([*parts, f"peak memory {peak_memory() / 2**30:.2f} GiB; curves in {folder / PLOT}"]))


def peak_memory() -> int:
    """Bytes: the most that was in use on the first GPU, or by this process where there is none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
