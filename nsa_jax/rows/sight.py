"""Values that are not finite: who sees one.

Kernels get keys and values in which a row that is not finite is 0, and are told which queries see such a row: their
results are NaN, and no other query's are. A product with an unseen NaN would be NaN even where its weight is 0.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

NOTHING, FINITE, UNCLEAN = 0, 1, 2  # what a query sees


def finite_rows(x: Array) -> Array:
    """bool [...]: whether the rows of x [..., D] are finite."""
    return jnp.isfinite(x).all(axis=-1)


def clear(x: Array, keep: Array) -> Array:
    """x [..., D] with 0 for rows that are not to be kept."""
    return jnp.where(keep[..., None], x, jnp.zeros((), x.dtype))


def clean_rows(x: Array) -> Array:
    """x [..., D] with 0 for rows that are not finite."""
    return clear(x, finite_rows(x))


def of_ranges(unclean: Array, first: Array, end: Array) -> Array:
    """int8 [B, Tq, H]: what queries see of several ranges of keys.

    Args:
        unclean: int8 [B, H, C], 1 for keys that are not finite.
        first, end: int32 [B, Tq, H, S], the ranges [first, end), any of which may be empty.
    """
    listed = end > first
    before = jnp.pad(jnp.cumsum(unclean, axis=2, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    find = jax.vmap(jax.vmap(lambda row, at: row[at], in_axes=(0, 1), out_axes=1))
    count = find(before, jnp.where(listed, end, 0)) - find(before, jnp.where(listed, first, 0))
    seen = jnp.where((count > 0).any(axis=-1), jnp.int8(UNCLEAN), jnp.int8(FINITE))
    return jnp.where(listed.any(axis=-1), seen, jnp.int8(NOTHING))


def taint(seen: Array, tainted: Array) -> Array:
    """What queries see, int8 [B, Tq, H], where those tainted, bool [B, Tq, H], see something that is not finite."""
    return jnp.where(tainted & (seen != NOTHING), jnp.int8(UNCLEAN), seen)
