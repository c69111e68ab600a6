"""What the passes of all branches share: what is kept of a branch, and what of a query counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.queries import Row
from nsa_jax.runtime.partitioning import OF_QUERIES, QUERY

Array = jax.Array


class Branch(NamedTuple):
    """What the backward pass takes of a branch.

    Attributes:
        output: [B, Tq, N, V], of the forward pass.
        lse: float32 [B, Tq, N], likewise.
        weight: float32 [B, Tq, N], wide enough to be copied ahead; the cotangent of the output is weight * d_output.
        d_lse: float32 [B, Tq, N], the cotangent of the lse; None for 0.
    """

    output: Array
    lse: Array
    weight: Array
    d_lse: Array | None = None

    def placeholders(self, query: Array, before: Array | None) -> tuple[Array, ...]:
        """(lse, d_lse, weight, before) as a kernel takes them: an array of the shape that it does not read for None."""
        d_lse = self.lse if self.d_lse is None else self.d_lse
        return self.lse, d_lse, self.weight, query if before is None else before


#: The axes of a Branch, see `partitioning`.
BRANCH = Branch(QUERY, OF_QUERIES, OF_QUERIES, OF_QUERIES)


class Statistics(NamedTuple):
    """What the pass of keys and values takes of its rows, float32 [B, Tq, N], queries in the order of their places.

    A row that sees nothing or whose result is NaN is dead, which its lse tells: nothing of it counts.
    """

    lse: Array
    delta: Array
    weight: Array


def statistics(row: Row, branch: Branch, delta: Array) -> Statistics:
    """The Statistics of a branch, with the delta that the pass of the queries gives."""
    return Statistics(*map(row.queries.in_order, (branch.lse, delta, branch.weight)))


def untouched(query: Array, before: Array | None) -> Array:
    """The gradient of queries that see nothing, added to `before` if given."""
    return jnp.zeros_like(query) if before is None else before
