"""How large a recall experiment is."""

import dataclasses
from types import MappingProxyType

import jax.numpy as jnp
from recall_tasks import Symbols

from nsa_jax.linen import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """A recall experiment.

    Attributes:
        model: the model of the arm "nsa".
        symbols: keys and values there are.
        row_length: T; rows are packed full with segments of one length.
        rows: B of a step.
        lengths: of segments, ascending; training starts with the shortest.
        counts: pairs, needles or questions in a segment.
        depths: where the asked needle stands, in the evaluation of needles.
        steps, learning_rate, warmup_steps: of AdamW, with a cosine to a tenth.
        eval_batches: batches that each figure is measured on.
    """

    model: TransformerConfig
    symbols: Symbols
    row_length: int
    rows: int
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    steps: int
    learning_rate: float
    warmup_steps: int
    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    eval_batches: int = 4


def _model(symbols: Symbols, **fields) -> TransformerConfig:
    return TransformerConfig(vocab_size=symbols.vocab_size, num_kv_heads=1, remat=False, **fields)


_FEW, _MANY = Symbols(32, 16), Symbols(1024, 1024)
_TINY = _model(
    _FEW, hidden_size=64, num_layers=2, num_heads=2, head_dim=32, block_size=16, block_counts=4, window_size=16
)
_SMALL = _model(_MANY, hidden_size=256, num_layers=2, num_heads=8, head_dim=64, dtype=jnp.bfloat16)
_TOY = Size(
    _TINY,
    _FEW,
    row_length=256,
    rows=8,
    lengths=(64, 128, 256),
    counts=(4, 8),
    steps=600,
    learning_rate=3e-3,
    warmup_steps=50,
    depths=(0.0, 0.5, 1.0),
)
_GPU = Size(
    _SMALL,
    _MANY,
    row_length=8192,
    rows=8,
    lengths=(512, 1024, 2048, 4096, 8192),
    counts=(16, 64, 256),
    steps=1000,
    learning_rate=1e-3,
    warmup_steps=50,
)

#: By task: "toy" for a CPU, "gpu" for one GPU.
SIZES = MappingProxyType(
    {
        "toy": {
            "mqar": _TOY,
            "needle": dataclasses.replace(_TOY, counts=(4,)),
            "phone-book": dataclasses.replace(_TOY, counts=(2,), lengths=(128, 256)),
        },
        "gpu": {
            "mqar": _GPU,
            "needle": dataclasses.replace(
                _GPU, counts=(8,), row_length=32768, rows=2, lengths=(2048, 4096, 8192, 16384, 32768), eval_batches=8
            ),
            "phone-book": dataclasses.replace(_GPU, counts=(8,)),
        },
    }
)
