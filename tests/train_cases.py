"""What the tests of training share: a tiny run, as a value and as command-line options."""

import dataclasses

import numpy as np

from nsa_jax.linen import TransformerConfig
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.packing import VOCAB_SIZE

MODEL = TransformerConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    block_size=16,
    block_counts=2,
    window_size=8,
    tie_embeddings=True,
    remat=False,
)
CONFIG = TrainConfig(
    MODEL, sequence_length=32, batch_size=4, steps=20, learning_rate=1e-2, warmup_steps=2, eval_rows=4, eval_interval=10
)
_RUN = ("sequence_length", "batch_size", "steps", "learning_rate", "warmup_steps", "eval_rows", "eval_interval")
_MODEL = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "block_size",
    "block_counts",
    "window_size",
)
OPTIONS = {name: getattr(CONFIG, name) for name in _RUN} | {name: getattr(MODEL, name) for name in _MODEL}
OPTIONS |= {"devices": 1, "checkpoint_interval": 5, "sample_bytes": 8, "implementation": "xla", "dtype": "float32"}


def arguments(**options):
    """The tiny run's options, some changed, as the command takes them."""
    options = OPTIONS | options
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def with_model(**fields):
    """CONFIG with some fields of the model changed."""
    return dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **fields))


def write_data(folder):
    """Twenty short texts in a folder."""
    generator = np.random.default_rng(0)
    words = [generator.integers(97, 123, size).astype(np.uint8).tobytes() for size in generator.integers(2, 8, 30)]
    for number in range(20):
        (folder / f"{number}.txt").write_bytes(b" ".join(generator.choice(words, 40)))
    return folder
