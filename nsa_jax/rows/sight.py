"""Values that are not finite: who sees one.

Kernels get keys and values in which a row that is not finite is 0, and are told which queries see such a row: their
results are NaN, and no other query's are. A product with an unseen NaN would be NaN even where its weight is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.intervals import Intervals

Array = jax.Array

NOTHING, FINITE, UNCLEAN = 0, 1, 2  # what a query sees


class Cleaned(NamedTuple):
    """Keys and values in which rows that are not finite are 0.

    Attributes:
        key: [B, C, H, K].
        value: [B, C, H, V].
        before: int32 [B, H, C + 1], how many such rows there are among the first 0, 1, ... C keys.
    """

    key: Array
    value: Array
    before: Array


def count_before(unclean: Array) -> Array:
    """int32 [B, H, C + 1], see `Cleaned`, of unclean int32 [B, C, H]."""
    count = jnp.cumsum(unclean.swapaxes(1, 2), axis=2, dtype=jnp.int32)
    return jnp.pad(count, ((0, 0), (0, 0), (1, 0)))


def finite_rows(x: Array) -> Array:
    """bool [...]: whether the rows of x [..., D] are finite."""
    return jnp.isfinite(x).all(axis=-1)


def clear(x: Array, keep: Array) -> Array:
    """x [..., D] with 0 for rows that are not to be kept."""
    return jnp.where(keep[..., None], x, jnp.zeros((), x.dtype))


def of_intervals(before: Array, intervals: Intervals) -> Array:
    """int8 [B, Tq, H]: what queries see of their intervals; before: see `Cleaned`."""
    count = _between(before, intervals.key_begin[:, :, None], intervals.key_end[:, :, None])
    return _sight((intervals.key_end > intervals.key_begin)[:, :, None], count[..., 0] > 0)


def of_blocks(before: Array, first: Array, end: Array) -> Array:
    """int8 [B, Tq, H]: what queries see of the keys [first, end), int32 [B, Tq, H, S], any of which may be empty."""
    listed = end > first
    count = _between(before, jnp.where(listed, first, 0), jnp.where(listed, end, 0))
    return _sight(listed.any(axis=-1), (count > 0).any(axis=-1))


def taint(seen: Array, tainted: Array) -> Array:
    """What queries see, int8 [B, Tq, H], where those tainted, bool [B, Tq, H], see something that is not finite."""
    return jnp.where(tainted & (seen != NOTHING), jnp.int8(UNCLEAN), seen)


def _between(before: Array, begin: Array, end: Array) -> Array:
    """int32 [B, Tq, H, S]: unclean keys in [begin, end), [B, Tq, S] or [B, Tq, H, S]."""
    axis = None if begin.ndim == 3 else 1
    of_heads = jax.vmap(lambda row, at: row[at], in_axes=(0, axis), out_axes=1)
    find = jax.vmap(of_heads)
    return find(before, end) - find(before, begin)


def _sight(sees: Array, unclean: Array) -> Array:
    return jnp.where(sees, jnp.where(unclean, jnp.int8(UNCLEAN), jnp.int8(FINITE)), jnp.int8(NOTHING))
