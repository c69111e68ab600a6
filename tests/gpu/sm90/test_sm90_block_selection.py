"""Selection's Gluon kernel for Hopper GPUs against plain jnp, in bfloat16 and float16."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, float32_of, normal, packing, row
from test_block_selection import (
    arrays,
    assert_nan_stays_where_it_is,
    assert_packed_equals_alone,
    assert_same_in_any_order,
    assert_ties_go_to_the_smaller_index,
    assert_well_formed,
    assert_what_is_not_finite_stays_in_its_list,
    orders,
    queries_of,
    select,
)

from nsa_jax import tiling
from nsa_jax.gpu import backends
from nsa_jax.gpu.sm90 import block_selection

# packed, T, G, H, K, block_size, window, stride, S, dtype, (num_init_blocks, num_local_blocks)
CASES = [
    (False, 1, 16, 1, 64, 64, 64, 64, 4, "bfloat16", (1, 2)),
    (True, 63, 8, 3, 128, 16, 4, 2, 2, "bfloat16", (1, 2)),
    (True, 257, 16, 2, 128, 16, 16, 16, 3, "bfloat16", (0, 1)),
    (False, 333, 32, 1, 64, 32, 16, 16, 5, "float16", (2, 2)),
    (True, 600, 64, 1, 128, 16, 8, 4, 4, "bfloat16", (1, 2)),
    (True, 700, 16, 2, 64, 16, 16, 4, 5, "bfloat16", (0, 1)),  # windows that reach beyond the query
    (False, 1200, 8, 2, 64, 16, 4, 2, 9, "bfloat16", (1, 2)),  # several chunks, windows across their edges
    (False, 1200, 8, 1, 64, 16, 8, 2, 6, "bfloat16", (1, 1)),  # both
    (False, 1200, 16, 1, 128, 16, 6, 2, 37, "bfloat16", (3, 4)),  # a list of more than 32
    (True, 1200, 8, 2, 128, 16, 16, 16, 40, "float16", (1, 2)),  # and the most tokens to a unit
    (True, 4700, 16, 1, 128, 16, 16, 16, 6, "bfloat16", (1, 2)),
    (False, 5000, 32, 1, 128, 16, 16, 16, 16, "float16", (1, 2)),
]


def is_within(inner, outer):
    """[B, T, H]: whether all blocks that are listed in the one are in the other, too."""
    return np.asarray(((inner[..., :, None] == outer[..., None, :]) | (inner < 0)[..., None]).any(-1).all(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(hopper, case):
    packed, T, G, H, K, block_size, window, stride, S, dtype, (num_init, num_local) = case
    segment_ids = packing(T) if packed else None
    query, key, lse = arrays(T, 2 if packed else 1, T, G * H, H, K, window, stride, segment_ids, dtype)
    count = min(S, -(-T // block_size))
    assert backends.block_selection(query, key, count, block_size // stride) is block_selection
    options = {
        "block_size": block_size, "window": window, "stride": stride, "segment_ids": segment_ids,
        "num_init_blocks": num_init, "num_local_blocks": num_local,
    }  # fmt: skip
    run = select("triton", block_counts=S, **options)
    actual = np.asarray(run(query, key, lse))
    assert actual.shape == (*query.shape[:2], H, S) and actual.dtype == np.int32
    assert_well_formed(actual)
    fewer, expected, more = (
        np.asarray(select("xla", block_counts=count, **options)(*float32_of((query, key)), lse))
        for count in (S - 1, S, S + 1)
    )
    # sums in another order: of two blocks that are all but equally important the other one may be the last
    np.testing.assert_array_equal((actual >= 0).sum(-1), (expected >= 0).sum(-1))
    assert is_within(fewer, actual).all() and is_within(actual, more).all()
    assert (actual == expected).all(-1).mean() > 0.99
    assert_same_bits([run(query, key, lse)], [actual])
    if packed:
        np.testing.assert_array_equal(actual[np.asarray(segment_ids) < 0], -1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_init, num_local", [(0, 1), (1, 3), (2, 2), (3, 1)])
def test_forced_blocks_and_counts(hopper, num_init, num_local):
    T, H, S, block_size = 100, 2, 4, 16
    segment_ids = jnp.asarray(row(T, (1, 80), (2, 20)))[None]
    inputs = arrays(3, 1, T, H * 16, H, 64, block_size, block_size, segment_ids, "bfloat16")
    counts = np.random.default_rng(num_init).integers(-1, S + 2, (1, T, H)).astype(np.int32)
    options = {
        "block_size": block_size, "segment_ids": segment_ids, "block_counts": jnp.asarray(counts), "max_block_count": S,
        "num_init_blocks": num_init, "num_local_blocks": num_local,
    }  # fmt: skip
    actual = np.asarray(select("triton", **options)(*inputs))
    assert_well_formed(actual)
    # at most five blocks, whose importances are far apart
    np.testing.assert_array_equal(actual, select("xla", **options)(*float32_of(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [16, 2])  # one chunk, and two
def test_ties_go_to_the_smaller_index(hopper, stride):
    T, block_size, S = 700, 16, 5
    # whole numbers, exact in any order of summation, and equal keys: equal importances
    query = jnp.round(normal(4, 1, T, 16, 64)).astype(jnp.bfloat16)
    key = jnp.broadcast_to(jnp.round(normal(5, 64)).astype(jnp.bfloat16), (1, T // stride, 1, 64))
    lse = jnp.full((1, T, 16), 5.0)
    options = {"block_counts": S, "block_size": block_size, "window": stride, "stride": stride}
    assert_ties_go_to_the_smaller_index(select("triton", **options)(query, key, lse), block_size, S)
    # an lse so large that every probability underflows to zero
    assert_ties_go_to_the_smaller_index(select("triton", **options)(query, key, lse + 1e4), block_size, S)


# G, H, K, block_size, window, stride, count, S, (num_init_blocks, num_local_blocks)
ANY_ORDER = [
    (8, 1, 64, 16, 16, 4, 5, 5, (0, 1)),
    (16, 2, 128, 16, 16, 16, 4, 16, (1, 2)),
    (64, 1, 64, 32, 32, 16, 4, 4, (1, 2)),
]


def mixed(case):
    """Queries, keys and options of two rows: segments and padding, and a segment that begins late."""
    G, H, K, block_size, window, stride, count, S, (num_init, num_local) = case
    mixture = row(700, (-1, 3), (0, 333), (1, 1), (-1, 5), (0, 270), (-1, 88))
    segment_ids = jnp.asarray([mixture, row(700, (0, 20), (1, 680))])
    query, key, lse = arrays(11, 2, 700, G * H, H, K, window, stride, segment_ids, "bfloat16")
    assert block_selection.supports(query, key, S, block_size // stride)
    queries = queries_of(query, lse, count, H, block_size, window, stride, segment_ids)
    options = {"S": S, "num_init": num_init, "num_local": num_local}
    return queries, key, options | {"block_size": block_size, "window": window, "stride": stride}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ANY_ORDER, ids=str)
@pytest.mark.parametrize("name", orders(700))
def test_queries_may_be_any(hopper, name, case):
    queries, key, options = mixed(case)
    assert_same_in_any_order(queries, key, orders(700)[name], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ANY_ORDER, ids=str)
@pytest.mark.parametrize("in_order", [True, False])
def test_what_is_not_finite_stays_in_its_list(hopper, in_order, case):
    queries, key, options = mixed(case)
    if not in_order:
        queries = queries.take(np.random.default_rng(1).permutation(700)[:500])
    numbers = np.arange(0, queries.query.shape[1], 7)
    assert_what_is_not_finite_stays_in_its_list(queries, key, numbers, **options)


@pytest.mark.gpu
def test_packed_equals_alone(hopper):
    segment_ids = jnp.asarray(row(700, (-1, 3), (0, 333), (1, 1), (-1, 5), (0, 270), (-1, 88)))[None]
    assert_packed_equals_alone(arrays(6, 1, 700, 16, 1, 64, 8, 4, segment_ids, "bfloat16"), segment_ids, 5)


@pytest.mark.gpu
def test_nan_on_padding_and_in_empty_slots_stays_there(hopper):
    segment_ids = packing(163)
    assert_nan_stays_where_it_is(arrays(7, 2, 163, 32, 2, 64, 8, 4, segment_ids, "bfloat16"), segment_ids)


def test_where_it_is_used():
    def used(capability=90, width=128, itemsize=2, group=16, count=16, share=1):
        return block_selection.is_for(capability, width, itemsize, group, count, share)

    assert all(used(group=group, width=64, share=8, count=64) for group in (8, 16, 32, 64))
    assert all(used(share=share) for share in (1, 2, 4))
    assert not any(used(capability=other) for other in (tiling.INTERPRETER, 80, 100))
    assert not any(used(width=other) for other in (32, 192))
    assert not any(used(group=other) for other in (4, 12, 128))
    assert not used(itemsize=4) and not used(count=65) and not used(share=16)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [8, 16, 32, 64])
def test_ring_fits(width, group):
    from nsa_jax.kernels.sm90 import select_blocks as kernels

    rows, windows = kernels.UNIT.value, kernels.WINDOWS.value
    stages = block_selection.stages(width, group)
    assert 2 <= stages <= kernels.NOTES.value
    queries, statistics, sums = 2 * 2 * rows * width, 2 * 4 * rows, 2 * 4 * rows // group * windows
    notes_and_barriers = 1024
    assert stages * 2 * 64 * width + queries + statistics + sums + notes_and_barriers <= 1024 * tiling.SHARED_MEMORY[90]
