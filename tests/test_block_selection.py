"""Selection: the Triton kernel against plain jnp, forced blocks, ties, packing and transformations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, float32_of, normal, packing, qkv, row, spans

from nsa_jax import compressed_attention, select_blocks
from nsa_jax.gpu import backends
from nsa_jax.gpu.block_selection import sizes_of
from nsa_jax.rows.intervals import window_intervals
from nsa_jax.rows.queries import locate

# packed, T, G, H, K, block_size, window, stride, S
CASES = [
    (False, 1, 1, 1, 16, 64, 64, 64, 4),
    (True, 17, 32, 1, 16, 16, 8, 4, 1),
    (False, 63, 6, 1, 100, 16, 16, 8, 3),
    (True, 63, 16, 1, 8, 32, 32, 32, 16),
    (True, 63, 8, 1, 192, 16, 4, 1, 2),
    (False, 100, 3, 2, 4, 16, 16, 16, 3),
    (True, 100, 3, 2, 4, 16, 16, 16, 3),
    (False, 257, 4, 1, 16, 64, 32, 16, 3),
    (True, 257, 4, 1, 16, 32, 16, 8, 3),
    (True, 257, 1, 1, 16, 16, 16, 16, 4),
    (False, 300, 2, 1, 16, 128, 128, 64, 2),
]


def arrays(seed, B, T, N, H, K, window, stride, segment_ids=None, dtype=np.float32):
    """Query, compressed keys and the lse of the compressed branch; random, so that importances are distinct."""
    query, key, value = qkv(seed, B, T, N, H, K, 4, C=T // stride, dtype=dtype)
    options = {"window": window, "stride": stride, "segment_ids": segment_ids, "implementation": "xla"}
    _, lse = compressed_attention(*float32_of((query, key, value)), return_residual=True, **options)
    return query, key, lse


def select(implementation, **options):
    return jax.jit(functools.partial(select_blocks, implementation=implementation, **options))


def forced(own, num_init, num_local):
    """The blocks always taken, first those that go first where there is little room."""
    local = [own - i for i in range(num_local) if own - i >= 0]
    return local + [j for j in range(num_init) if j <= own and j not in local]


def assert_well_formed(indices):
    """Ascending, no block twice, then only -1."""
    listed = indices >= 0
    assert (listed[..., 1:] <= listed[..., :-1]).all()
    assert (indices[..., 1:] > indices[..., :-1])[listed[..., 1:]].all()
    assert (indices[~listed] == -1).all()


class Queries(NamedTuple):
    """Queries and what the kernels are told of each: [B, T, N, K], [B, T, N], [B, T, H], else [B, T]."""

    query: jax.Array
    lse: jax.Array
    count: jax.Array
    segment_start: jax.Array
    own_block: jax.Array
    key_begin: jax.Array
    key_end: jax.Array

    def take(self, order):
        """The queries of these numbers, all rows' alike."""
        return Queries(*(x[:, order] for x in self))


def queries_of(query, lse, count, H, block_size, window, stride, segment_ids=None):
    """One `Queries` for every token of the rows; count: blocks to take, an int or [B, T, H]."""
    row = locate(segment_ids, None, *query.shape[:2])
    tokens, seen = row.tokens, window_intervals(row, window, stride)
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), (*query.shape[:2], H))
    count = jnp.where(tokens.valid[..., None], count, 0)
    return Queries(query, lse, count, tokens.start, tokens.position // block_size, seen.key_begin, seen.key_end)


def choose(queries, key, *, S, block_size, window, stride, num_init=1, num_local=2):
    """block_indices [B, T, H, S] from the kernel itself, which is told what `queries` say: they may be any."""
    query, *arrays = queries
    share = block_size // stride
    sizes = sizes_of(
        query, key, S=S, SCALE=query.shape[-1] ** -0.5, BLOCK_STRIDES=share, WINDOW_STRIDES=window // stride,
        INIT=num_init, LOCAL=num_local,
    )  # fmt: skip
    backend = backends.block_selection(query, key, S, share)
    return np.asarray(backend.select(query, key, *arrays, sizes=sizes, flops=1))


def assert_same_in_any_order(queries, key, order, **options):
    """The queries of these numbers by themselves, in this order, get what they get among all."""
    whole = choose(queries, key, **options)
    assert_well_formed(whole)
    np.testing.assert_array_equal(choose(queries.take(order), key, **options), whole[:, order])


def orders(T):
    """Slices, shuffles and repeats of T queries."""
    random = np.random.default_rng(T)
    everything = np.arange(T)
    return {
        "the last": everything[-1:],
        "a slice": everything[T // 2 : T // 2 + T // 7],
        "a late slice": everything[-T // 5 :],
        "backwards": everything[::-1],
        "shuffled": random.permutation(T),
        "some, shuffled": random.permutation(T)[: T // 4],
        "repeats": random.integers(0, T, T + 5),
        "one place": np.full(9, T - 2),
        "the first": np.zeros(40, int),  # where it is padding, there is nothing else
    }


def poison(queries, numbers):
    """The `Queries` with what is not finite at these numbers, by turns: one head's query or all, the lse."""
    group = queries.query.shape[2] // queries.count.shape[2]
    query, lse = np.array(queries.query, np.float32), np.array(queries.lse)
    for i, number in enumerate(numbers):
        match i % 5:
            case 0:
                query[:, number] = np.nan
            case 1:
                query[:, number, -1, 3] = -np.nan
            case 2:
                query[:, number, 0] = np.inf
            case 3:
                lse[:, number, ::group] = np.nan
            case 4:
                lse[:, number] = -np.inf
    return queries._replace(query=jnp.asarray(query).astype(queries.query.dtype), lse=jnp.asarray(lse))


def assert_what_is_not_finite_stays_in_its_list(queries, key, numbers, **options):
    """numbers: of the queries to poison. Lists of others do not change, theirs are well-formed and the same twice."""
    clean = choose(queries, key, **options)
    poisoned = choose(poison(queries, numbers), key, **options)
    others = np.setdiff1d(np.arange(clean.shape[1]), numbers)
    np.testing.assert_array_equal(poisoned[:, others], clean[:, others])
    np.testing.assert_array_equal(choose(poison(queries, numbers), key, **options), poisoned)
    assert_well_formed(poisoned)
    np.testing.assert_array_equal((poisoned >= 0).sum(-1), (clean >= 0).sum(-1))
    for b, i, h in np.ndindex(clean.shape[0], len(numbers), clean.shape[2]):
        own = int(queries.own_block[b, numbers[i]])
        listed = [j for j in poisoned[b, numbers[i], h] if j >= 0]
        best = forced(own, options.get("num_init", 1), options.get("num_local", 2))
        assert max(listed, default=0) <= own and set(best[: len(listed)]) <= set(listed)
        best += [j for j in range(own + 1) if j not in best]  # importances that are no numbers are equal
        assert i % 5 in (1, 2) or listed == sorted(best[: len(listed)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    packed, T, G, H, K, block_size, window, stride, S = case
    segment_ids = packing(T) if packed else None
    inputs = arrays(T, 2 if packed else 1, T, G * H, H, K, window, stride, segment_ids)
    options = {"block_size": block_size, "window": window, "stride": stride, "segment_ids": segment_ids}
    actual, expected = (np.asarray(select(name, block_counts=S, **options)(*inputs)) for name in ("triton", "xla"))
    assert actual.shape == (*inputs[0].shape[:2], H, S) and actual.dtype == np.int32
    assert_well_formed(actual)
    np.testing.assert_array_equal(actual, expected)
    if packed:
        np.testing.assert_array_equal(actual[np.asarray(segment_ids) < 0], -1)


def test_several_chunks_and_long_lists():
    # 38 blocks, more than a chunk holds in the interpreter, with windows across its edge; up to 34 are chosen, in a
    # list of more than the 32 lanes that hold one of its rows
    T = 600
    inputs = arrays(0, 1, T, 2, 1, 16, 16, 8)
    counts = np.zeros((1, T, 1), np.int32)
    counts[0, -24:-12], counts[0, -12:] = 5, 34
    options = {"block_counts": jnp.asarray(counts), "max_block_count": 34, "block_size": 16, "window": 16, "stride": 8}
    actual, expected = (np.asarray(select(name, **options)(*inputs)) for name in ("triton", "xla"))
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal((actual >= 0).sum(-1), counts)


MIXED = ((-1, 3), (0, 90), (1, 21), (-1, 5), (0, 120), (-1, 11))  # segments and padding of a row of 250


@pytest.fixture(scope="module")
def mixed():
    """Queries, keys and options of two rows: short segments and padding, and a segment that begins late."""
    segment_ids = jnp.asarray([row(250, *MIXED), row(250, (0, 20), (1, 230))])
    query, key, lse = arrays(11, 2, 250, 2, 1, 16, 16, 8, segment_ids)
    options = {"block_size": 16, "window": 16, "stride": 8}
    return queries_of(query, lse, 4, 1, segment_ids=segment_ids, **options), key, options | {"S": 4}


@pytest.mark.parametrize("name", orders(250))
def test_queries_may_be_any(mixed, name):
    queries, key, options = mixed
    assert_same_in_any_order(queries, key, orders(250)[name], **options)


def test_what_is_not_finite_stays_in_its_list(mixed):
    queries, key, options = mixed
    queries = queries.take(np.random.default_rng(1).permutation(250)[:120])
    assert_what_is_not_finite_stays_in_its_list(queries, key, np.arange(0, 120, 7), **options)


@pytest.mark.parametrize("num_init, num_local", [(0, 1), (1, 3), (2, 2), (3, 1)])
def test_forced_blocks_and_counts(num_init, num_local):
    T, H, S, block_size = 100, 1, 4, 16
    segment_ids = jnp.asarray(row(T, (1, 80), (2, 20)))[None]
    inputs = arrays(3, 1, T, 2, H, 16, block_size, block_size, segment_ids)
    counts = np.random.default_rng(num_init).integers(-1, S + 2, (1, T, H)).astype(np.int32)
    options = {
        "block_size": block_size, "segment_ids": segment_ids, "block_counts": jnp.asarray(counts), "max_block_count": S,
        "num_init_blocks": num_init, "num_local_blocks": num_local,
    }  # fmt: skip
    actual, expected = (np.asarray(select(name, **options)(*inputs)) for name in ("triton", "xla"))
    np.testing.assert_array_equal(actual, expected)
    for t in range(T):
        own = (t if t < 80 else t - 80) // block_size
        for h in range(H):
            count = np.clip(counts[0, t, h], 0, S)
            listed = actual[0, t, h][actual[0, t, h] >= 0]
            assert len(listed) == min(count, own + 1) and (listed <= own).all()
            assert set(forced(own, num_init, num_local)[:count]) <= set(listed)


def assert_ties_go_to_the_smaller_index(actual, block_size, S):
    for t in range(actual.shape[1]):
        own = t // block_size
        expected = forced(own, 1, 2)
        expected += [j for j in range(own + 1) if j not in expected]
        expected = sorted(expected[:S])
        assert list(actual[0, t, 0]) == expected + [-1] * (S - len(expected))


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_ties_go_to_the_smaller_index(implementation):
    T, block_size, S = 128, 16, 5
    # whole numbers, exact in any order of summation, and equal keys: equal importances
    query = jnp.round(normal(4, 1, T, 2, 16))
    key = jnp.broadcast_to(jnp.round(2 * normal(5, 16)), (1, T // block_size, 1, 16))
    actual = select(implementation, block_counts=S, block_size=block_size)(query, key, jnp.full((1, T, 2), 5.0))
    assert_ties_go_to_the_smaller_index(actual, block_size, S)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_blocks_of_no_importance_are_candidates(implementation):
    # an lse so large that every probability underflows to zero
    query, key, _ = qkv(4, 1, 128, 1, 1, 16, 4, C=8)
    actual = select(implementation, block_counts=6, block_size=16)(query, key, jnp.full((1, 128, 1), 1e4))
    np.testing.assert_array_equal(actual[0, -1, 0], [0, 1, 2, 3, 6, 7])


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("S", [0, 2])
def test_rows_without_windows(implementation, S):
    query = normal(0, 1, 20, 2, 16)
    key = jnp.zeros((1, 0, 1, 16))
    actual = select(implementation, block_counts=S)(query, key, jnp.full((1, 20, 2), -jnp.inf))
    np.testing.assert_array_equal(actual, np.broadcast_to(np.asarray([0, -1][:S], np.int32), (1, 20, 1, S)))


def assert_packed_equals_alone(inputs, segment_ids, block_counts):
    options = {"block_counts": block_counts, "block_size": 16, "window": 8, "stride": 4}
    packed = np.asarray(select("triton", segment_ids=segment_ids, **options)(*inputs))
    slot = 0
    for start, stop in spans(np.asarray(segment_ids[0])):
        slots = (stop - start) // 4
        windows = max((stop - start - 8) // 4 + 1, 0)
        key = jnp.pad(inputs[1][:, slot : slot + windows], ((0, 0), (0, slots - windows), (0, 0), (0, 0)))
        alone = select("triton", **options)(inputs[0][:, start:stop], key, inputs[2][:, start:stop])
        np.testing.assert_array_equal(packed[:, start:stop], alone)
        slot += windows


def test_packed_equals_alone():
    segment_ids = packing(110)[:1]
    assert_packed_equals_alone(arrays(6, 1, 110, 4, 1, 16, 8, 4, segment_ids), segment_ids, 3)


def assert_nan_stays_where_it_is(inputs, segment_ids):
    """On padding and in empty slots; the second row is all padding."""
    query, key, lse = inputs
    run = select("triton", block_counts=3, block_size=16, window=8, stride=4, segment_ids=segment_ids)
    padding = np.asarray(segment_ids < 0)
    full = sum(max((stop - start - 8) // 4 + 1, 0) for start, stop in spans(np.asarray(segment_ids[0])))
    empty = np.arange(key.shape[1]) >= np.asarray([[full], [0]])
    poisoned = (
        jnp.where(padding[..., None, None], jnp.nan, query),
        jnp.where(empty[..., None, None], jnp.nan, key),
        jnp.where(padding[..., None], jnp.nan, lse),
    )
    assert_same_bits([run(*poisoned)], [run(query, key, lse)])


def test_nan_on_padding_and_in_empty_slots_stays_there():
    segment_ids = packing(63)
    assert_nan_stays_where_it_is(arrays(7, 2, 63, 4, 2, 16, 8, 4, segment_ids), segment_ids)


def test_same_bits_twice():
    inputs = arrays(8, 2, 70, 6, 2, 16, 16, 16, packing(70))
    run = select("triton", block_counts=3, block_size=16, segment_ids=packing(70))
    assert_same_bits([run(*inputs)], [run(*inputs)])


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_transformations(implementation):
    T = 70
    options = {"block_counts": 3, "block_size": 16, "segment_ids": packing(T)[:1], "implementation": implementation}
    inputs = [jnp.stack(pair) for pair in zip(*(arrays(s, 1, T, 2, 1, 16, 16, 16) for s in (8, 9)), strict=True)]
    expected = jnp.stack([select_blocks(*(x[i] for x in inputs), **options) for i in range(2)])
    run = functools.partial(select_blocks, **options)

    def loss(query, key, lse):
        indices = jax.checkpoint(run)(query, key, lse)
        return jnp.sum(query) * jnp.sum(indices).astype(jnp.float32)

    _, scanned = jax.lax.scan(lambda carry, x: (carry, run(*x)), None, tuple(inputs))
    assert_same_bits([jax.jit(jax.vmap(run))(*inputs), scanned], [expected, expected])
    d_query, d_key, d_lse = jax.jit(jax.grad(loss, (0, 1, 2)))(*(x[0] for x in inputs))
    np.testing.assert_array_equal(d_query, np.full_like(d_query, expected[0].sum()))  # none of it through the selection
    assert not d_key.any() and not d_lse.any()


def test_shard_map():
    devices = min(2, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    inputs = arrays(10, 2, 40, 2, 1, 16, 16, 16)
    run = functools.partial(select_blocks, block_counts=2, block_size=16, implementation="triton")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert_same_bits([jax.jit(sharded)(*inputs)], [run(*inputs)])
