"""Attention to selected blocks of keys, and to a short sliding window with them, as a differentiable function."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.branches import nothing_seen
from nsa_jax.checkpoint_names import name_residuals
from nsa_jax.gpu import cleaning
from nsa_jax.gpu.branch import BRANCH, Branch, statistics, untouched
from nsa_jax.gpu.walks import Choice, PairedWalks, Walks, seen_of
from nsa_jax.rows.intervals import sliding_intervals
from nsa_jax.runtime.partitioning import KEY, OF_QUERIES, QUERY, ROWS, SIGHT, UNCLEAN, partitioned

Array = jax.Array


class Spec(NamedTuple):
    """What is static about a call.

    Attributes:
        block_size: keys in a block.
        scale: factor on the scores.
        precision: of float32 products, see `device.dot_precision`.
        window_size: keys in the sliding window that is attended to in the same pass; 0 for none.
        backend: module of the kernels, see `backends`.
    """

    block_size: int
    scale: float
    precision: str
    window_size: int
    backend: ModuleType


class Routes(NamedTuple):
    """Which blocks the queries want, how the passes of the queries walk them, and what is seen there.

    Attributes:
        choice: the blocks.
        walks: of the backend; None where no block is wanted.
        sight: int8 [B, Tq, H], see `rows.sight`.
        sliding_sight: int8 [B, Tq, H], likewise of the sliding window.
    """

    choice: Choice
    walks: Walks | PairedWalks | None
    sight: Array
    sliding_sight: Array


def does_sliding(window_size: int, block_size: int) -> bool:
    """Whether the pass over the selected blocks does the sliding window too: while it touches at most two blocks."""
    return 0 < window_size <= block_size + 1


# The axes of a Choice, of Walks, of Routes, see `partitioning`
_CHOICE = Choice(ROWS, SIGHT, ROWS)
_WALKS = "bh"
_ROUTES = Routes(_CHOICE, _WALKS, SIGHT, SIGHT)


def route(query: Array, value: Array, unclean: Array, choice: Choice, spec: Spec) -> Routes:
    """The Routes of a choice; unclean: see `cleaning.Cleaned`."""

    def run(query, value, unclean, choice):
        walks = spec.backend.walk(choice, query, value, spec) if choice.wanted else None
        return walks, seen_of(choice, unclean, spec.block_size)

    results = _WALKS, SIGHT
    walks, seen = partitioned(run, (query, value, unclean, choice), (QUERY, KEY, UNCLEAN, _CHOICE), results)
    near = seen
    if spec.window_size:
        near = cleaning.of_intervals(unclean, sliding_intervals(choice.row, spec.window_size))
    return Routes(choice, walks, seen, near)


def forward(query: Array, key: Array, value: Array, routes: Routes, spec: Spec) -> list[tuple[Array, Array]]:
    """(output [B, Tq, N, V], lse float32 [B, Tq, N]) of the selected branch, then of the sliding one if any."""
    if routes.choice.wanted == 0:
        return [nothing_seen(query, value)]

    def run(query, key, value, routes):
        return spec.backend.forward(query, key, value, routes, spec)

    pairs = [(QUERY, OF_QUERIES)] * (2 if spec.window_size else 1)
    return partitioned(run, (query, key, value, routes), (QUERY, KEY, KEY, _ROUTES), pairs)


def backward_query(
    query: Array,
    key: Array,
    value: Array,
    d_output: Array,
    branches: list[Branch],
    routes: Routes,
    spec: Spec,
    before: Array | None = None,
) -> tuple[Array, list[Array]]:
    """(d_query [B, Tq, N, K], added to `before` if given; deltas float32 [B, Tq, N] of the branches, for
    `backward_key_value`); branches as `forward` gives them, of which only the selected one's lse may have a cotangent.
    """
    if routes.choice.wanted == 0:
        return untouched(query, before), [jnp.zeros_like(branch.lse) for branch in branches]

    def run(query, key, value, d_output, branches, routes, before):
        return spec.backend.backward_query(query, key, value, d_output, branches, routes, spec, before)

    unsighted = routes._replace(sight=None, sliding_sight=None)
    arrays = query, key, value, d_output, branches, unsighted, before
    axes = QUERY, KEY, KEY, QUERY, [BRANCH] * len(branches), _ROUTES, QUERY
    return partitioned(run, arrays, axes, (QUERY, [OF_QUERIES] * len(branches)))


def backward_key_value(
    query: Array,
    key: Array,
    value: Array,
    d_output: Array,
    branches: list[Branch],
    deltas: list[Array],
    routes: Routes,
    spec: Spec,
) -> tuple[Array, Array]:
    """(d_key [B, T, H, K], d_value [B, T, H, V]); branches and deltas as in `backward_query`."""
    choice = routes.choice
    if choice.wanted == 0:
        return jnp.zeros_like(key), jnp.zeros_like(value)

    def run(query, key, value, d_output, branches, deltas, choice):
        rows = [statistics(choice.row, branch, delta) for branch, delta in zip(branches, deltas, strict=True)]
        query, d_output = (choice.row.queries.in_order(x) for x in (query, d_output))
        return spec.backend.backward_key_value(query, key, value, d_output, rows, choice.in_order(), spec)

    count = len(branches)
    axes = QUERY, KEY, KEY, QUERY, [BRANCH] * count, [OF_QUERIES] * count, _CHOICE
    return partitioned(run, (query, key, value, d_output, branches, deltas, choice), axes, (KEY, KEY))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, query: Array, key: Array, value: Array, choice: Choice) -> tuple[Array, Array]:
    """(output [B, Tq, N, V], lse float32 [B, Tq, N]) of attention to the selected blocks."""
    return _attend_forward(spec, query, key, value, choice)[0]


def _attend_forward(spec, query, key, value, choice):
    key, value, unclean = cleaning.clean(key, value)
    routes = route(query, value, unclean, choice, spec)
    output, lse = name_residuals("selected", *forward(query, key, value, routes, spec)[0])
    return (output, lse), (query, key, value, routes, output, lse)


def _attend_backward(spec, residuals, cotangents):
    query, key, value, routes, output, lse = residuals
    d_output, d_lse = cotangents
    branches = [Branch(output, lse, jnp.ones_like(lse), d_lse)]
    d_query, deltas = backward_query(query, key, value, d_output, branches, routes, spec)
    return d_query, *backward_key_value(query, key, value, d_output, branches, deltas, routes, spec), None


attend.defvjp(_attend_forward, _attend_backward)
