"""What a training run is, as one frozen value, and ready-made ones."""

import dataclasses
import math
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from nsa_jax.linen import config as linen_config
from nsa_jax.train.packing import VOCAB_SIZE

_MOST = 2**31 - 1  # steps and sizes are int32
_FLOAT32 = jnp.finfo(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: the model; its vocabulary is the bytes and three special tokens.
        sequence_length: T, tokens of a row; a multiple of the model's block_size.
        batch_size: rows of a step, over all devices.
        steps: optimiser steps.
        learning_rate: AdamW's, at its peak.
        warmup_steps: steps of linear warm-up; a cosine to a tenth of the peak follows.
        weight_decay: of matrices, not of norms and biases.
        clip_norm: the largest global norm of a gradient.
        seed: of the initial parameters, of the order of the data and of what is held out.
        held_out: fraction of the documents held out.
        eval_rows: rows of held-out text that are evaluated.
        eval_interval, checkpoint_interval: steps from one to the next.
        sample_bytes: bytes of text to generate at the end.

    Raises:
        ValueError: a number is out of range, or sequence_length is not a multiple of block_size.
    """

    model: linen_config.TransformerConfig
    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    held_out: float = 0.05
    eval_rows: int = 64
    eval_interval: int = 100
    checkpoint_interval: int = 100
    sample_bytes: int = 256

    def __post_init__(self):
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "block_size"):
            _expect(name, getattr(self.model, name), 1, _MOST)
        for name in ("sequence_length", "batch_size", "steps"):
            _expect(name, getattr(self, name), 1, _MOST)
        for name in ("eval_rows", "eval_interval", "checkpoint_interval"):
            _expect(name, getattr(self, name), 1)
        _expect("learning_rate", self.learning_rate, float(_FLOAT32.tiny), float(_FLOAT32.max))
        if self.clip_norm != math.inf:  # which clips nothing
            _expect("clip_norm", self.clip_norm, float(_FLOAT32.tiny), float(_FLOAT32.max))
        _expect("weight_decay", self.weight_decay, 0, float(_FLOAT32.max))
        for name, most in (("warmup_steps", _MOST - 1), ("seed", 2**32 - 1), ("sample_bytes", _MOST)):
            _expect(name, getattr(self, name), 0, most)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a fraction between 0 and 1, got {self.held_out}")
        if self.sequence_length % self.model.block_size:
            block = self.model.block_size
            raise ValueError(f"sequence_length: expected a multiple of block_size={block}, got {self.sequence_length}")

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on from, by field name: all but when to report and to save."""
        fields = dataclasses.asdict(self)
        model = fields.pop("model")
        for name in ("eval_rows", "eval_interval", "checkpoint_interval", "sample_bytes"):
            del fields[name]
        for name in ("dtype", "param_dtype"):
            model[name] = jnp.dtype(model[name]).name
        return {**model, "branches": list(model["branches"]), **fields}

    @classmethod
    def of_identity(cls, identity: dict[str, Any]) -> "TrainConfig":
        """The run that has this identity; when it reports and saves is as by default.

        Raises:
            ValueError: a field is missing or out of range.
        """
        names = [field.name for field in dataclasses.fields(linen_config.TransformerConfig)]
        model = {name: identity[name] for name in names if name in identity}
        own = {field.name: identity[field.name] for field in dataclasses.fields(cls) if field.name in identity}
        try:
            for name in ("dtype", "param_dtype"):
                model[name] = jnp.dtype(model[name])
            model["branches"] = tuple(model["branches"])
            return cls(linen_config.TransformerConfig(**model), **own)
        except (KeyError, TypeError) as error:
            raise ValueError(f"checkpoint: not of a run of this version ({error})") from error


def _expect(name: str, value: float, least: float, most: float = math.inf) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected a {'positive number' if least else 'number of at least 0'}, got {value}")
    if value > most:
        raise ValueError(f"{name}: expected a number up to {most:.10g}, got {value}")


def _byte_model(preset: str) -> linen_config.TransformerConfig:
    return dataclasses.replace(linen_config.PRESETS[preset], vocab_size=VOCAB_SIZE)


#: Runs by name: "tiny" for two CPU cores, the others for a GPU.
PRESETS = MappingProxyType(
    {
        "tiny": TrainConfig(
            _byte_model("tiny"), sequence_length=256, batch_size=4, steps=700, learning_rate=3e-3, warmup_steps=50
        ),
        "small": TrainConfig(
            _byte_model("small"), sequence_length=8192, batch_size=16, steps=500, learning_rate=1e-3, warmup_steps=50
        ),
        "340m": TrainConfig(
            _byte_model("340m"), sequence_length=8192, batch_size=8, steps=2000, learning_rate=3e-4, warmup_steps=200
        ),
    }
)
