"""Selections to measure on: random blocks, and queries that make neighbouring tokens choose alike.

The realistic data are queries that drift, over independent keys: each component is a stationary Gaussian process over
the tokens, of correlation exp(-(drift * distance)^2 / 2), a sum of waves of fixed frequencies. The top blocks of such
queries turn over gradually. The drift is chosen so that the blocks of NEIGHBOURS consecutive tokens overlap as asked:
their distinct blocks are `overlap` times the sum of their picks (1 / NEIGHBOURS: all alike; 1: none shared).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from plan import Case

NEIGHBOURS = 4
FORCED = 3  # blocks that every query takes: its own, the one before, the first
_WAVES = 64
_CHUNK = 1024  # tokens at a time


def drifting_queries(key: jax.Array, case: Case, drift: float) -> jax.Array:
    """[B, T, N, D] in the case's dtype: unit variance, correlated along the tokens."""
    amplitudes = jax.random.normal(key, (2 * _WAVES, case.N * case.D), jnp.float32)
    waves = jnp.asarray(_waves(drift, np.arange(case.B * case.T)), jnp.bfloat16)
    query = jnp.matmul(waves, amplitudes.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return query.astype(case.dtype).reshape(case.B, case.T, case.N, case.D)


def _waves(drift: float, time: np.ndarray) -> np.ndarray:
    """[times, 2 * _WAVES]: the values of the waves, each row of unit length."""
    quantiles = jax.scipy.special.ndtri(np.asarray((np.arange(_WAVES) + 0.5) / _WAVES, np.float32))
    phase = drift * time[:, None] * np.asarray(quantiles, np.float64)[None, :]
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / _WAVES**0.5


@functools.cache
def drift_for(overlap: float, length: int, block_size: int, picks: int) -> float:
    """The drift at which the picks of neighbours amid a row overlap as asked, by bisection on a simulation."""
    candidates = max(1, length // block_size // 2 - FORCED)
    free = min(picks - FORCED, candidates - 1)
    if free < 1:
        return 0.0
    noise = np.random.default_rng(0).standard_normal((64, 2 * _WAVES, candidates))
    low, high = 1e-4, 3.0
    for _ in range(16):
        drift = (low * high) ** 0.5
        scores = _waves(drift, np.arange(NEIGHBOURS)) @ noise  # [repeats, NEIGHBOURS, candidates]
        chosen = scores >= np.partition(scores, -free, axis=2)[:, :, -free, None]
        distinct = FORCED + chosen.any(axis=1).sum(axis=1).mean()
        low, high = (drift, high) if distinct < overlap * NEIGHBOURS * (FORCED + free) else (low, drift)
    return (low * high) ** 0.5


@functools.partial(jax.jit, static_argnums=1)
def random_blocks(key: jax.Array, case: Case) -> jax.Array:
    """int32 [B, T, H, S]: up to S distinct blocks drawn evenly from those up to the query's own, ascending, then -1."""
    blocks = -(-case.T // case.block_size)
    size = min(_CHUNK, case.T)
    picks = min(case.S, blocks)

    def chunk(first):
        own = (first + jnp.arange(size, dtype=jnp.int32)) // case.block_size
        shape = (case.B, size, case.H, blocks)
        priority = jax.random.uniform(jax.random.fold_in(key, first), shape)
        candidate = jnp.arange(blocks, dtype=jnp.int32)[None, :] <= own[:, None]  # [size, blocks]
        priority, block = jax.lax.top_k(jnp.where(candidate[None, :, None, :], priority, -1.0), picks)
        block = jnp.sort(jnp.where(priority >= 0, block, blocks), axis=-1)
        return jnp.where(block < blocks, block, -1)

    chosen = jax.lax.map(chunk, jnp.arange(0, case.T, size, dtype=jnp.int32))  # [chunks, B, size, H, picks]
    chosen = jnp.moveaxis(chosen, 0, 1).reshape(case.B, -1, case.H, picks)[:, : case.T]
    return jnp.pad(chosen, ((0, 0),) * 3 + ((0, case.S - picks),), constant_values=-1)


@jax.jit
def measured_overlap(block_indices: jax.Array) -> jax.Array:
    """Distinct blocks of NEIGHBOURS consecutive tokens over the sum of their picks, from int32 [B, T, H, S]."""
    B, T, H, S = block_indices.shape
    tiles = T // NEIGHBOURS
    listed = block_indices[:, : tiles * NEIGHBOURS].reshape(B, tiles, NEIGHBOURS, H, S).swapaxes(2, 3)
    listed = jnp.sort(listed.reshape(B, tiles, H, NEIGHBOURS * S), axis=-1)
    before = jnp.pad(listed[..., :-1], ((0, 0),) * 3 + ((1, 0),), constant_values=-1)
    distinct = jnp.sum((listed >= 0) & (listed != before), dtype=jnp.float32)
    return distinct / jnp.sum(listed >= 0, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def visible_keys(block_indices: jax.Array, block_counts: jax.Array, block_size: int) -> jax.Array:
    """int32 [B, T, H]: keys that a query sees in the first block_counts [B, T, H] of its blocks [B, T, H, S]."""
    token = jax.lax.broadcasted_iota(jnp.int32, block_indices.shape, 1)
    entry = jax.lax.broadcasted_iota(jnp.int32, block_indices.shape, 3)
    listed = (block_indices >= 0) & (entry < block_counts[..., None])
    return jnp.sum(jnp.where(listed, jnp.clip(token - block_indices * block_size + 1, 0, block_size), 0), axis=-1)
