"""Compression windows: which slots of a row hold one, and where it begins."""

import jax
import jax.numpy as jnp

from nsa_jax.rows.queries import Queries
from nsa_jax.rows.segments import Layout

Array = jax.Array


def complete_at(tokens: Layout, window: int, stride: int) -> Array:
    """bool [B, T]: whether a window ends at this token."""
    past = tokens.position - (window - 1)
    return tokens.valid & (past >= 0) & (past % stride == 0)


def windows_seen(queries: Queries | Layout, window: int, stride: int) -> Array:
    """int32 [B, Tq]: windows of the query's segment that are complete where it stands."""
    past = queries.position - (window - 1)
    return jnp.where(queries.valid & (past >= 0), past // stride + 1, 0)


def window_starts(tokens: Layout, window: int, stride: int) -> Array:
    """int32 [B, T // stride]: the row index of the first token of each window, -1 for a slot with no window.

    Windows fill the slots in row order: those of the first segment, then those of the second, and so on.
    """
    completes = complete_at(tokens, window, stride)
    slot = jnp.cumsum(completes, axis=1, dtype=jnp.int32) - 1
    return scatter(slot, tokens.index - (window - 1), completes, tokens.start.shape[1] // stride, -1)


def scatter(slots: Array, values: Array, keep: Array, size: int, fill: int) -> Array:
    """[B, size] with values[b, i] at slots[b, i] where `keep`, `fill` elsewhere; kept slots of a row are distinct."""
    slots = jnp.where(keep, slots, size)
    empty = jnp.full((size,), fill, jnp.int32)
    return jax.vmap(lambda slot, value: empty.at[slot].set(value, mode="drop"))(slots, values)
