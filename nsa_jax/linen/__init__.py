"""Flax linen modules: the attention layer, its compression map, and a language model built of them."""

from nsa_jax.linen.attention import NativeSparseAttention
from nsa_jax.linen.compression import MLPCompression
from nsa_jax.linen.config import PRESETS, TransformerConfig
from nsa_jax.linen.dense import DenseAttention
from nsa_jax.linen.generation import Generated, generate
from nsa_jax.linen.pytorch import config_from_torch, from_torch
from nsa_jax.linen.transformer import NSATransformer, remat_policy

__all__ = [
    "PRESETS",
    "DenseAttention",
    "Generated",
    "MLPCompression",
    "NSATransformer",
    "NativeSparseAttention",
    "TransformerConfig",
    "config_from_torch",
    "from_torch",
    "generate",
    "remat_policy",
]
