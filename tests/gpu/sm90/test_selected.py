"""The selected branch's Gluon kernels for Hopper GPUs against plain jnp, in bfloat16 and float16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    RATIO,
    assert_close,
    assert_same_bits,
    assert_small_error_ratio,
    counts_of,
    float32_of,
    normal,
    packing,
    qkv,
    row,
    run,
    spans,
    without_infinities,
)

from nsa_jax import selected_attention, tiling
from nsa_jax.gpu.sm90 import selected as sm90
from nsa_jax.runtime import jax_triton_gluon

# T, block_size, S, counts, G, H, K, V, dtype, packed
SHAPES = [
    (1, 64, 4, None, 16, 1, 128, 128, "bfloat16", False),
    (63, 64, 3, "array", 8, 2, 64, 128, "bfloat16", True),
    (257, 32, 5, None, 16, 2, 128, 64, "bfloat16", True),
    (333, 64, 4, 3, 32, 1, 128, 128, "float16", False),
    (500, 128, 3, None, 16, 1, 128, 128, "bfloat16", True),
    (515, 64, 8, "array", 16, 1, 64, 64, "float16", True),
    (130, 32, 3, None, 64, 1, 64, 64, "bfloat16", True),
    (129, 64, 2, None, 128, 1, 128, 128, "bfloat16", True),
    (1031, 64, 16, None, 16, 4, 128, 128, "bfloat16", False),
]


def drawn(seed, B, T, H, S, block_size, alike):
    """Block indices: unsorted, some negative, repeated, or beyond the query's own; `alike`: in runs of 40 tokens."""
    rng = np.random.default_rng(seed)
    own = np.arange(T).reshape(1, T, 1, 1) // block_size
    indices = rng.integers(-1, own + 2, (B, T, H, S))
    return jnp.asarray(indices[:, np.arange(T) // 40 * 40] if alike else indices, jnp.int32)


def attention(implementation, indices, **options):
    options = {"block_size": 64, "block_indices": indices, "implementation": implementation, **options}
    return functools.partial(selected_attention, return_residual=True, **options)


def uses_these_kernels(query, value, block_size=64):
    return sm90.supports(query, value, 0.1, block_size, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "alike"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(hopper, shape, alike):
    T, block_size, S, counts, G, H, K, V, dtype, packed = shape
    B = 2 if packed else 1
    options = {"block_size": block_size, "segment_ids": packing(T) if packed else None, "scale": 0.1}
    options["block_counts"] = counts_of(counts, B, T, H, S)
    indices = drawn(T, B, T, H, S, block_size, alike)
    arrays = qkv(T, B, T, G * H, H, K, V, dtype=dtype)
    assert uses_these_kernels(arrays[0], arrays[2], block_size)
    cotangents = normal(1, B, T, G * H, V, dtype=dtype), normal(2, B, T, G * H)
    attend = attention("triton", indices, **options)
    actual = run(attend, arrays, cotangents=cotangents)
    expected = run(attention("xla", indices, **options), float32_of(arrays), cotangents=float32_of(cotangents))
    np.testing.assert_array_equal(np.isinf(actual[1]), np.isinf(expected[1]))
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), RATIO)
    assert_same_bits(run(attend, arrays, cotangents=cotangents), actual)
    if packed:
        for result in (actual[0], *actual[2:]):
            np.testing.assert_array_equal(np.asarray(result[1], np.float32), 0.0)  # a row of padding


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "packed"), [(64, False), (128, True)])
def test_blocks_of_many_items(hopper, monkeypatch, block_size, packed):
    """What is shared out among items, by their number and by stretches of the row, some of which lie in a block."""
    monkeypatch.setattr(tiling, "selected_chunk", lambda capability: 40)
    monkeypatch.setattr(tiling, "selected_stretch", lambda capability: 150)
    T, G, H = 700, 16, 2
    B = 2 if packed else 1
    indices = drawn(8, B, T, H, 3, block_size, False).at[..., 0].set(0)
    options = {"block_size": block_size, "segment_ids": packing(T) if packed else None}
    arrays = qkv(8, B, T, G * H, H, 128, 128, dtype="bfloat16")
    assert sm90.supports(arrays[0], arrays[2], 0.1, block_size, 0)
    cotangents = normal(1, B, T, G * H, 128, dtype="bfloat16"), normal(2, B, T, G * H)
    actual = run(attention("triton", indices, **options), arrays, cotangents=cotangents)
    expected = run(attention("xla", indices, **options), float32_of(arrays), cotangents=float32_of(cotangents))
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), RATIO)
    assert_same_bits(run(attention("triton", indices, **options), arrays, cotangents=cotangents), actual)


@pytest.mark.gpu
def test_packed_equals_alone(hopper):
    T, G = 700, 16
    segment_ids = row(T, (-1, 3), (0, 333), (1, 1), (-1, 5), (0, 270), (-1, 88))[None]
    indices = drawn(2, 1, T, 1, 4, 64, False)
    arrays = qkv(2, 1, T, G, 1, 128, 128, dtype="bfloat16")
    cotangents = normal(5, 1, T, G, 128, dtype="bfloat16"), normal(6, 1, T, G)
    packed = run(attention("triton", indices, segment_ids=jnp.asarray(segment_ids)), arrays, cotangents=cotangents)
    for start, stop in spans(segment_ids[0]):
        alone, weights = (tuple(x[:, start:stop] for x in group) for group in (arrays, cotangents))
        expected = run(attention("triton", indices[:, start:stop]), alone, cotangents=weights)
        # the same sums in another order: the rounding of bfloat16
        assert_close([x[:, start:stop] for x in packed], expected, tolerance=2**-7)


@pytest.mark.gpu
def test_what_lies_behind_a_row_is_not_read(hopper):
    T, G = 75, 16  # the last block ends beyond the row, where the next row begins
    arrays = qkv(3, 2, T, G, 1, 128, 128, dtype="bfloat16")
    poisoned = tuple(x.at[1].set(jnp.nan) for x in arrays)
    attend = attention("triton", drawn(3, 2, T, 1, 3, 64, False))
    for a, e in zip(attend(*poisoned), attend(*arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(a[0]), np.asarray(e[0]))


@pytest.mark.gpu
def test_vmap_equals_a_loop(hopper):
    T, G = 90, 16
    arrays = qkv(5, 1, T, G, 1, 64, 64, dtype="bfloat16")
    queries = jnp.stack([arrays[0], 2 * arrays[0] - 1])
    indices = jnp.stack([drawn(seed, 1, T, 1, 2, 64, False) for seed in (0, 1)])

    def everything(query, indices):
        return run(attention("triton", indices), (query, *arrays[1:]))

    mapped = jax.vmap(everything)(queries, indices)
    for i in range(2):
        assert_same_bits([x[i] for x in mapped], everything(queries[i], indices[i]))


def test_where_they_are_used():
    def tile(capability=90, widths=(128, 128), itemsize=2, group=16, block_size=64):
        return tiling.selected_hopper(capability, widths, itemsize, group, block_size)

    assert tile() == (8, 64, 7)
    assert tile(group=32, block_size=128)[:2] == (4, 64)
    # of the 64 rows of a warpgroup three quarters, in whole tokens
    assert [tiling.hopper_together(group) for group in (8, 16, 32, 64, 128)] == [6, 3, 2, 1, 1]
    for other in (
        {"capability": tiling.INTERPRETER}, {"capability": 80}, {"capability": 100}, {"itemsize": 4}, {"group": 4},
        {"group": 12}, {"widths": (192, 128)}, {"widths": (128, 32)}, {"block_size": 16},
    ):  # fmt: skip
        assert tile(**other) is None, other
    for widths in ((64, 64), (128, 64), (128, 128)):
        for block_size in (32, 64, 128):
            _, keys, stages = tile(widths=widths, block_size=block_size)
            assert stages >= 2 and 2 * stages * keys * sum(widths) < 1024 * tiling.SHARED_MEMORY[90]


def test_a_launch_has_the_warps_of_all_partitions():
    assert jax_triton_gluon.warps(".visible .entry forward()\n.reqntid 384\n{", 8) == 12
    assert jax_triton_gluon.warps(".visible .entry forward()\n{", 8) == 8


def test_kernels_that_meet_their_neighbour_are_launched_in_pairs():
    assert jax_triton_gluon.programs_of_cluster("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;") == 2
    assert jax_triton_gluon.programs_of_cluster("bar.sync 0;") == 1
