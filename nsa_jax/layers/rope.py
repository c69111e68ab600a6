"""Rotary position embedding."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rotate(x: Array, position: Array, *, theta: float) -> Array:
    """Turns channel pairs (i, i + K / 2) by position * theta^(-2i / K).

    Args:
        x: [B, T, H, K], K even.
        position: int32 [B, T], tokens.
        theta: the base of the wavelengths.

    Returns:
        [B, T, H, K] in x's dtype; computed in float32.

    Source: Su et al. 2021, arXiv 2104.09864, equation 34.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None, None] * frequency[None, None, None, :]  # [B, T, 1, K / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
