"""Where queries stand, what intervals of keys they see and who sees a key, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_cases import LENGTH, random_ids, run_at, runs_of

from nsa_jax.rows.blocks import blocks
from nsa_jax.rows.intervals import sliding_intervals, window_intervals
from nsa_jax.rows.queries import locate

FAR = 2**31 - 1
QUERIES = {
    "all": lambda rng: None,
    "slice": lambda rng: np.arange(40, 55) + np.zeros((3, 1), int),
    "shuffled": lambda rng: np.stack([rng.permutation(LENGTH) for _ in range(3)]),
    "repeated": lambda rng: rng.integers(20, 24, (3, 30)),
    "more than tokens, some outside": lambda rng: rng.integers(-4, LENGTH + 4, (3, LENGTH + 20)),
    "far outside": lambda rng: rng.choice([-FAR - 1, -1, LENGTH, FAR, 7], (3, 9)),
    "one": lambda rng: np.array([[30], [LENGTH - 1], [0]]),
}


@pytest.fixture(params=QUERIES)
def stands(request):
    """(ids, places int [3, Tq], the Row of both)."""
    ids = random_ids(len(request.param))
    places = QUERIES[request.param](np.random.default_rng(1))
    indices = None if places is None else jnp.asarray(places, jnp.int32)
    places = np.broadcast_to(np.arange(LENGTH), ids.shape) if places is None else places
    return ids, places, locate(jnp.asarray(ids), indices, *ids.shape)


def valid_at(ids, places):
    """bool [3, Tq]: whether the query stands at a token that is no padding."""
    inside = (places >= 0) & (places < LENGTH)
    return inside & (np.take_along_axis(ids, np.where(inside, places, 0), axis=1) >= 0)


def test_a_query_has_the_segment_and_position_of_its_token(stands):
    ids, places, row = stands
    queries, valid = jax.tree.map(np.asarray, row.queries), valid_at(ids, places)
    assert row.length == LENGTH
    np.testing.assert_array_equal(queries.valid, valid)
    assert ((queries.place >= 0) & (queries.place < LENGTH)).all()
    for b, i in zip(*np.nonzero(valid), strict=True):
        start, stop = run_at(ids[b], places[b, i])
        got = (queries.place[b, i], queries.start[b, i], queries.stop[b, i], queries.position[b, i])
        assert got == (places[b, i], start, stop, places[b, i] - start)


def test_order_is_that_of_places(stands):
    ids, places, row = stands
    in_order = np.asarray(
        row.queries.in_order(jnp.asarray(np.arange(places.size, dtype=np.int32).reshape(places.shape)))
    )
    valid = valid_at(ids, places)
    if not row.sliced:
        np.testing.assert_array_equal(in_order.reshape(-1), np.arange(places.size))
        return
    for b in range(3):
        order = in_order[b] - b * places.shape[1]
        assert sorted(order) == list(range(places.shape[1]))
        # padding last, and of queries at one place the first first
        keys = [(places[b, i] if valid[b, i] else LENGTH, i) for i in order]
        assert keys == sorted(keys)


def seen_pairs(intervals, row):
    """{(b, query, key)} from the queries' side, and from the keys'."""
    intervals = jax.tree.map(np.asarray, intervals)
    number = jnp.broadcast_to(jnp.arange(intervals.key_begin.shape[1]), intervals.key_begin.shape)
    in_order = np.asarray(row.queries.in_order(number))
    by_query = {
        (b, t, key)
        for b, t in np.ndindex(intervals.key_begin.shape)
        for key in range(intervals.key_begin[b, t], intervals.key_end[b, t])
    }
    by_key = {
        (b, int(in_order[b, at]), key)
        for b, key in np.ndindex(intervals.query_begin.shape)
        for at in range(intervals.query_begin[b, key], intervals.query_end[b, key])
    }
    return by_query, by_key


@pytest.mark.parametrize("window_size", [0, 1, 5, 2**40, 10**400])
def test_sliding_intervals(stands, window_size):
    ids, places, row = stands
    expected = {
        (b, i, key)
        for b, i in zip(*map(np.ndarray.tolist, np.nonzero(valid_at(ids, places))), strict=True)
        for key in range(max(run_at(ids[b], places[b, i])[0], int(places[b, i]) - window_size + 1), places[b, i] + 1)
    }
    by_query, by_key = seen_pairs(sliding_intervals(row, window_size), row)
    assert by_query == by_key == expected


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 4), (8, 4), (6, 2), (64, 16)])
def test_window_intervals(stands, window, stride):
    ids, places, row = stands
    expected, valid = set(), valid_at(ids, places)
    for b in range(3):
        slot = 0
        for start, stop in runs_of(ids[b]):
            for first in range(start, stop - window + 1, stride):
                if ids[b, start] >= 0:
                    inside = valid[b] & (places[b] >= first + window - 1) & (places[b] < stop)
                    expected |= {(b, int(i), slot) for i in np.nonzero(inside)[0]}
                    slot += 1
    by_query, by_key = seen_pairs(window_intervals(row, window, stride), row)
    assert by_query == by_key == expected


@pytest.mark.parametrize(("block_size", "window_size"), [(4, 0), (16, 9), (16, 40)])
def test_queries_near_blocks(stands, block_size, window_size):
    ids, places, row = stands
    row_blocks, valid = jax.tree.map(np.asarray, blocks(row, block_size, window_size)), valid_at(ids, places)
    for b in range(3):
        standing = np.sort(places[b]) if not row.sliced else np.sort(places[b][valid[b]])
        for m in range(row_blocks.count[b]):
            begin = row_blocks.begin[b, m]
            assert row_blocks.first[b, m] == (standing < begin).sum()
            past = begin + block_size + window_size
            near = ((standing >= begin) & (standing < past)).sum()
            # at the row's end there may be more: what a mask is made for in vain
            assert row_blocks.near[b, m] == near if past <= LENGTH else row_blocks.near[b, m] >= near


def test_what_int32_cannot_hold_stays_out_of_the_row():
    indices = np.array([[2**32 + 1, -(2**40), 3]])
    import nsa_jax

    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 1, 4)), jnp.float32)
    output = nsa_jax.sliding_window_attention(
        x[:, :3], x, x, window_size=2, query_indices=indices, implementation="xla"
    )
    assert not output[:, :2].any() and output[:, 2].all()
