"""Attention to one interval of keys per query, the compressed and the sliding branch, as a differentiable function."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.branches import nothing_seen
from nsa_jax.checkpoint_names import name_residuals
from nsa_jax.gpu import cleaning
from nsa_jax.gpu.branch import BRANCH, Branch, statistics, untouched
from nsa_jax.rows.intervals import Intervals
from nsa_jax.rows.queries import Row
from nsa_jax.runtime.partitioning import KEY, OF_QUERIES, QUERY, ROWS, SIGHT, partitioned

Array = jax.Array


class Spec(NamedTuple):
    """What is static about a call.

    Attributes:
        branch: "compressed" or "sliding", for names in profiles and checkpoint policies.
        scale: factor on the scores.
        precision: of float32 products, see `device.dot_precision`.
        reach: most queries that see one key, 0 if any number can.
        most_seen: most keys that a query sees.
        backend: module of the kernels, see `backends`.
    """

    branch: str
    scale: float
    precision: str
    reach: int
    most_seen: int
    backend: ModuleType

    def pairs(self, queries: int, keys: int) -> int:
        """About how many (query, key) pairs a head computes, for profiles."""
        return queries * self.most_seen if self.most_seen < keys else queries * keys // 2


class Addends(NamedTuple):
    """What is to be added up where a branch's output is at hand.

    Attributes:
        gate: [B, Tq, N], of the branch itself.
        others: (output [B, Tq, N, V], gate [B, Tq, N]) of one or two other branches.
        keep: whether the branch's own output is wanted, too.
    """

    gate: Array
    others: tuple[tuple[Array, Array], ...]
    keep: bool


class Seen(NamedTuple):
    """Who sees whom: the row, its intervals, and what queries see, int8 [B, Tq, H], see `rows.sight`."""

    row: Row
    intervals: Intervals
    sight: Array


_SEEN = Seen(ROWS, ROWS, SIGHT)  # its axes, see `partitioning`


def see(row: Row, intervals: Intervals, unclean: Array) -> Seen:
    """The Seen of intervals; unclean: see `cleaning.Cleaned`."""
    return Seen(row, intervals, cleaning.of_intervals(unclean, intervals))


def forward(
    query: Array, key: Array, value: Array, seen: Seen, spec: Spec, addends: Addends | None = None
) -> tuple[Array | None, Array, Array | None]:
    """(output [B, Tq, N, V], lse float32 [B, Tq, N], gated sum [B, Tq, N, V]) of cleaned keys and values.

    The sum is that of the addends, None where the backend leaves it to the caller; unless they are to be kept the
    output may be None where there is a sum.
    """
    if key.shape[1] == 0:
        return *nothing_seen(query, value), None
    axes = (QUERY, KEY, KEY, _SEEN)
    if addends is None:

        def run(query, key, value, seen):
            return spec.backend.forward(query, key, value, seen, spec)

        return partitioned(run, (query, key, value, seen), axes, (QUERY, OF_QUERIES, QUERY))

    def run_and_add(query, key, value, seen, gate, others):
        return spec.backend.forward(query, key, value, seen, spec, Addends(gate, others, addends.keep))

    arrays = query, key, value, seen, addends.gate, addends.others
    of_others = ((QUERY, OF_QUERIES),) * len(addends.others)
    return partitioned(run_and_add, arrays, (*axes, OF_QUERIES, of_others), (QUERY, OF_QUERIES, QUERY))


def backward_query(
    query: Array,
    key: Array,
    value: Array,
    d_output: Array,
    branch: Branch,
    seen: Seen,
    spec: Spec,
    before: Array | None = None,
) -> tuple[Array, Array]:
    """(d_query [B, Tq, N, K], added to `before` if given; delta float32 [B, Tq, N], for `backward_key_value`)."""
    if key.shape[1] == 0:
        return untouched(query, before), jnp.zeros_like(branch.lse)

    def run(query, key, value, d_output, branch, seen, before):
        return spec.backend.backward_query(query, key, value, d_output, branch, seen, spec, before)

    arrays = query, key, value, d_output, branch, seen._replace(sight=None), before
    return partitioned(run, arrays, (QUERY, KEY, KEY, QUERY, BRANCH, _SEEN, QUERY), (QUERY, OF_QUERIES))


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, delta: Array, seen: Seen, spec: Spec
) -> tuple[Array, Array]:
    """(d_key [B, C, H, K], d_value [B, C, H, V]); delta is what `backward_query` gives."""
    if key.shape[1] == 0:
        return jnp.zeros_like(key), jnp.zeros_like(value)

    def run(query, key, value, d_output, branch, delta, row, intervals):
        rows = statistics(row, branch, delta)
        query, d_output = (row.queries.in_order(x) for x in (query, d_output))
        return spec.backend.backward_key_value(query, key, value, d_output, rows, intervals, spec)

    arrays = query, key, value, d_output, branch, delta, seen.row, seen.intervals
    return partitioned(run, arrays, (QUERY, KEY, KEY, QUERY, BRANCH, OF_QUERIES, ROWS, ROWS), (KEY, KEY))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, query: Array, key: Array, value: Array, row: Row, intervals: Intervals) -> tuple[Array, Array]:
    """(output [B, Tq, N, V], lse float32 [B, Tq, N]) of attention to the intervals."""
    # the forward pass hides a score, NaN or not: it multiplies only values by what it hides
    return _attend_forward(spec, query, key, value, row, intervals, with_key=False)[0]


def _attend_forward(spec, query, key, value, row, intervals, with_key=True):
    key, value, unclean = cleaning.clean(key, value, with_key)
    seen = see(row, intervals, unclean)
    output, lse = name_residuals(spec.branch, *forward(query, key, value, seen, spec)[:2])
    return (output, lse), (query, key, value, seen, output, lse)


def _attend_backward(spec, residuals, cotangents):
    query, key, value, seen, output, lse = residuals
    d_output, d_lse = cotangents
    branch = Branch(output, lse, jnp.ones_like(lse), d_lse)
    d_query, delta = backward_query(query, key, value, d_output, branch, seen, spec)
    return d_query, *backward_key_value(query, key, value, d_output, branch, delta, seen, spec), None, None


attend.defvjp(_attend_forward, _attend_backward)
