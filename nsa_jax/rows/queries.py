"""Where queries stand in their key row."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.segments import Layout, layout, search

Array = jax.Array


class Queries(NamedTuple):
    """Where each query stands, [B, Tq]: it has the segment and the position of the token at its place.

    Attributes:
        place: int32, its index in the key row, in any order, repeats allowed; of a padding query any index.
        start, stop: int32, the row indices of its segment's first token and past the last.
        position: int32, its position in the segment.
        valid: bool, False for a query outside of the row or at padding.
        order: int32, the queries in the order of their places, padding last; None if they stand in order.
        standing: int32, the places in that order, past the row for padding that `order` puts last; None where one query
            stands at each token.
    """

    place: Array
    start: Array
    stop: Array
    position: Array
    valid: Array
    order: Array | None = None
    standing: Array | None = None

    def between(self, begin: Array, end: Array) -> tuple[Array, Array]:
        """The queries, in order, that stand at [begin, end) of the row: int32 [B, X] to the first and past the last."""
        if self.standing is None:
            return begin, end
        find = jax.vmap(lambda standing, at: search(standing, at, "left"))
        return find(self.standing, begin), find(self.standing, end)

    def in_order(self, x: Array) -> Array:
        """x [B, Tq, ...] in the order of the queries' places."""
        return x if self.order is None else jax.vmap(lambda row, at: row[at])(x, self.order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """Key rows of a batch and the queries that stand in them.

    Attributes:
        tokens: the layout of the keys.
        queries: where the queries stand.
        packed: whether there are segment ids; static.
    """

    tokens: Layout
    queries: Queries
    packed: bool = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> int:
        """T, the tokens of a key row."""
        return self.tokens.start.shape[1]

    @property
    def sliced(self) -> bool:
        """Whether the queries stand at places of their own, and not at one token each."""
        return self.queries.standing is not None


def locate(
    segment_ids: Array | None, query_indices: Array | None, batch: int, length: int, *, ascending: bool = False
) -> Row:
    """The Row of key rows of `length` tokens.

    Args:
        segment_ids: int32 [batch, length], or None for one segment per row.
        query_indices: int32 [batch, Tq], or None for one query at each token.
        batch: B.
        length: T.
        ascending: whether the query indices are known to ascend, all of them inside of the row.
    """
    tokens = layout(segment_ids, batch, length)
    if query_indices is None:
        queries = Queries(tokens.index, *tokens)
        return Row(tokens, queries, packed=segment_ids is not None)
    if ascending:
        at = jax.tree.map(lambda x: jnp.take_along_axis(x, query_indices, axis=1), tokens)
        queries = Queries(query_indices, *at, standing=query_indices)
        return Row(tokens, queries, packed=segment_ids is not None)
    inside = (query_indices >= 0) & (query_indices < length)
    place = jnp.where(inside, query_indices, length - 1)
    at = jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), tokens)
    valid = at.valid & inside
    number = jax.lax.broadcasted_iota(jnp.int32, place.shape, 1)
    standing, order = jax.lax.sort((jnp.where(valid, place, length), number), num_keys=1, is_stable=True, dimension=1)
    queries = Queries(jnp.where(valid, place, length - 1), at.start, at.stop, at.position, valid, order, standing)
    return Row(tokens, queries, packed=segment_ids is not None)
