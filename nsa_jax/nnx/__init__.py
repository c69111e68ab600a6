"""Flax NNX modules: the attention layer and its compression map, and parameters moved to and from `nsa_jax.linen`."""

from nsa_jax.nnx.attention import NativeSparseAttention
from nsa_jax.nnx.compression import MLPCompression
from nsa_jax.nnx.conversion import load_linen, to_linen

__all__ = ["MLPCompression", "NativeSparseAttention", "load_linen", "to_linen"]
