"""What a language model is made of, as one frozen value, and ready-made ones."""

import dataclasses
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from nsa_jax.linen.attention import BRANCHES


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of an `NSATransformer`.

    Attributes:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: layers.
        num_heads, num_kv_heads, head_dim: attention heads, see `Projections`.
        mlp_size: width of SwiGLU's hidden layer; 8/3 hidden_size, rounded up to a multiple of 64, unless given.
        attention: "nsa" or "dense".
        block_size, block_counts, window_size, compression, compression_window, compression_stride, num_init_blocks,
            num_local_blocks, branches, separate_keys, implementation: see `NativeSparseAttention`.
        rope_theta: base of the rotary position embedding.
        norm_epsilon: added to the mean square in RMSNorm.
        tie_embeddings: whether the head is the embedding table, transposed.
        remat: whether the backward pass recomputes each layer, all but attention outputs and lse.
        dtype, param_dtype: of the computation and of the parameters.

    Raises:
        ValueError: a size is not positive, num_heads is not a multiple of num_kv_heads, head_dim is odd, or attention
            is unknown.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int | None = None
    attention: Literal["nsa", "dense"] = "nsa"
    block_size: int = 64
    block_counts: int = 16
    window_size: int = 512
    compression: str | nn.Module = "mean"
    compression_window: int | None = None
    compression_stride: int | None = None
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    branches: tuple[str, ...] = BRANCHES
    separate_keys: bool = False
    implementation: Literal["triton", "xla"] | None = None
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    remat: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(f"head_dim: expected a multiple of 4, got {self.head_dim}")
        if self.attention not in ("nsa", "dense"):
            raise ValueError(f"attention: expected 'nsa' or 'dense', got {self.attention!r}")

    @property
    def swiglu_size(self) -> int:
        """The width of SwiGLU's hidden layer."""
        return self.mlp_size or -(-8 * self.hidden_size // (3 * 64)) * 64


#: Models by name. "340m" has the configuration of the PyTorch project's 340M model, "tiny" trains on two CPU cores.
PRESETS = MappingProxyType(
    {
        "tiny": TransformerConfig(
            vocab_size=259,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            block_size=16,
            block_counts=4,
            window_size=64,
            tie_embeddings=True,
            remat=False,
        ),
        "small": TransformerConfig(
            vocab_size=259, hidden_size=512, num_layers=8, num_heads=16, num_kv_heads=1, head_dim=64
        ),
        "340m": TransformerConfig(
            vocab_size=32_000,
            hidden_size=1024,
            num_layers=24,
            num_heads=32,
            num_kv_heads=2,
            head_dim=64,
            mlp_size=2816,
        ),
    }
)
