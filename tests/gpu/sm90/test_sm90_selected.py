"""The selected branch's Gluon kernels for Hopper GPUs against plain jnp, in bfloat16 and float16."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    RATIO,
    assert_same_bits,
    assert_small_error_ratio,
    float32_of,
    normal,
    packing,
    qkv,
    run,
    without_infinities,
)

from nsa_jax import selected_attention, tiling
from nsa_jax.gpu import backends, selected_keys
from nsa_jax.gpu.sm90 import selected
from nsa_jax.runtime import jax_triton_gluon


def drawn(seed, B, T, H, S, block_size, alike):
    """Block indices: unsorted, some negative, repeated, or beyond the query's own; `alike`: in runs of 40 tokens."""
    rng = np.random.default_rng(seed)
    own = np.arange(T).reshape(1, T, 1, 1) // block_size
    indices = rng.integers(-1, own + 2, (B, T, H, S))
    return jnp.asarray(indices[:, np.arange(T) // 40 * 40] if alike else indices, jnp.int32)


def attention(implementation, indices, **options):
    options = {"block_size": 64, "block_indices": indices, "implementation": implementation, **options}
    return functools.partial(selected_attention, return_residual=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "packed"), [(64, False), (128, True)])
def test_blocks_of_many_items(hopper, monkeypatch, block_size, packed):
    """What is shared out among items, by their number and by stretches of the row, some of which lie in a block."""
    monkeypatch.setattr(selected_keys, "chunk", lambda capability: 40)
    monkeypatch.setattr(selected_keys, "stretch", lambda capability: 150)
    T, G, H = 700, 16, 2
    B = 2 if packed else 1
    indices = drawn(8, B, T, H, 3, block_size, False).at[..., 0].set(0)
    options = {"block_size": block_size, "segment_ids": packing(T) if packed else None}
    arrays = qkv(8, B, T, G * H, H, 128, 128, dtype="bfloat16")
    assert backends.selected(arrays[0], arrays[2], 0.1, block_size, 0) is selected
    cotangents = normal(1, B, T, G * H, 128, dtype="bfloat16"), normal(2, B, T, G * H)
    actual = run(attention("triton", indices, **options), arrays, cotangents=cotangents)
    expected = run(attention("xla", indices, **options), float32_of(arrays), cotangents=float32_of(cotangents))
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), RATIO)
    assert_same_bits(run(attention("triton", indices, **options), arrays, cotangents=cotangents), actual)


def test_where_they_are_used():
    def tile(capability=90, widths=(128, 128), itemsize=2, group=16, block_size=64):
        return selected.tile_of(capability, widths, itemsize, group, block_size)

    assert tile() == (8, 64, 7)
    assert tile(group=32, block_size=128)[:2] == (4, 64)
    # of the 64 rows of a warpgroup three quarters, in whole tokens
    assert [selected.together(group) for group in (8, 16, 32, 64, 128)] == [6, 3, 2, 1, 1]
    assert not any(tile(capability=other) for other in (tiling.INTERPRETER, 80, 100))
    assert not any(tile(group=other) for other in (4, 12))
    assert not any(tile(widths=other) for other in ((192, 128), (128, 32)))
    assert not tile(itemsize=4) and not tile(block_size=16)
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
