"""Who sees whom where every query sees one interval of keys: the sliding and the compressed branch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.queries import Row
from nsa_jax.rows.windows import complete_at, scatter, windows_seen

Array = jax.Array


class Intervals(NamedTuple):
    """Query t sees the keys from key_begin to key_end, key c is seen by the queries from query_begin to query_end.

    Attributes:
        key_begin, key_end: int32 [B, Tq]. Equal where the query sees nothing.
        query_begin, query_end: int32 [B, C], with C the number of keys, of the queries in the order of their places.
            Equal where nobody sees the key.
    """

    key_begin: Array
    key_end: Array
    query_begin: Array
    query_end: Array


def sliding_intervals(row: Row, window_size: int) -> Intervals:
    """The sliding branch: positions p - window_size + 1 .. p of the query's own segment."""
    tokens, queries = row.tokens, row.queries
    reach = min(window_size, row.length)  # window_size may exceed any int32
    begin, end = queries.between(
        jnp.where(tokens.valid, tokens.index, 0),
        jnp.where(tokens.valid, jnp.minimum(tokens.stop, tokens.index + reach), 0),
    )
    return Intervals(
        key_begin=jnp.where(queries.valid, jnp.maximum(queries.start, queries.place - reach + 1), 0),
        key_end=jnp.where(queries.valid, queries.place + 1, 0),
        query_begin=begin,
        query_end=end,
    )


def window_intervals(row: Row, window: int, stride: int) -> Intervals:
    """The compressed branch: the windows c of the query's segment with c * stride + window - 1 <= p."""
    tokens, queries = row.tokens, row.queries
    slots = row.length // stride
    completes = complete_at(tokens, window, stride)
    total = jnp.cumsum(completes, axis=1, dtype=jnp.int32)
    begin, end = queries.between(
        scatter(total - 1, tokens.index, completes, slots, 0),
        scatter(total - 1, tokens.stop, completes, slots, 0),
    )
    seen = windows_seen(queries, window, stride)
    if row.packed:
        complete = jnp.take_along_axis(total, queries.place, axis=1) if row.sliced else total
        key_end = jnp.where(seen > 0, complete, 0)
    else:
        key_end = seen  # the only segment's windows begin in slot 0
    return Intervals(key_begin=key_end - seen, key_end=key_end, query_begin=begin, query_end=end)
