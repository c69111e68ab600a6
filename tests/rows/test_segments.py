"""Where tokens stand: segments, windows, blocks and cu_seqlens against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_cases import LENGTH, random_ids, runs_of

from nsa_jax import segment_ids_from_cu_seqlens
from nsa_jax.rows import segments
from nsa_jax.rows.blocks import blocks, most_blocks
from nsa_jax.rows.queries import locate
from nsa_jax.rows.windows import window_starts


@pytest.fixture(params=range(5))
def ids(request):
    return random_ids(request.param)


def test_layout(ids):
    tokens = segments.layout(jnp.asarray(ids), *ids.shape)
    for b, row in enumerate(ids):
        for start, stop in runs_of(row):
            for t in range(start, stop):
                got = (tokens.start[b, t], tokens.stop[b, t], tokens.position[b, t], tokens.valid[b, t])
                assert tuple(map(int, got)) == (start, stop, t - start, row[t] >= 0)


def test_layout_without_ids_is_one_segment_per_row():
    whole = segments.layout(None, 2, LENGTH)
    jax.tree.map(np.testing.assert_array_equal, whole, segments.layout(jnp.zeros((2, LENGTH), jnp.int32), 2, LENGTH))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 4), (8, 4), (6, 2), (64, 16), (64, 64)])
def test_windows(ids, window, stride):
    tokens = segments.layout(jnp.asarray(ids), *ids.shape)
    starts = np.full((3, LENGTH // stride), -1)
    for b, row in enumerate(ids):
        slot = 0
        for start, stop in runs_of(row):
            for first in range(start, stop - window + 1, stride):
                if row[start] >= 0:
                    starts[b, slot] = first
                    slot += 1
    np.testing.assert_array_equal(window_starts(tokens, window, stride), starts)


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_blocks(ids, block_size):
    row_blocks = blocks(locate(jnp.asarray(ids), None, *ids.shape), block_size)
    assert row_blocks.begin.shape == (3, LENGTH)
    for b, row in enumerate(ids):
        spans = [
            (first, min(first + block_size, stop))
            for start, stop in runs_of(row)
            for first in range(start, stop, block_size)
        ]
        assert row_blocks.count[b] == len(spans)
        empty = [(0, 0)] * (LENGTH - len(spans))
        assert list(zip(row_blocks.begin[b].tolist(), row_blocks.end[b].tolist(), strict=True)) == spans + empty
        numbers = [number for number, (begin, end) in enumerate(spans) for _ in range(begin, end)]
        assert row_blocks.number[b].tolist() == numbers


def test_most_blocks_bounds_every_packing():
    assert most_blocks(False, 65, 16) == 5
    ids = jnp.arange(65, dtype=jnp.int32)[None]
    assert most_blocks(True, 65, 16) == blocks(locate(ids, None, 1, 65), 16).count[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_clear_padding(ids, dtype):
    x = np.random.default_rng(0).integers(1, 100, (*ids.shape, 2, 3))
    cleared = segments.clear_padding(jnp.asarray(x, dtype), jnp.asarray(ids >= 0))
    assert cleared.dtype == dtype
    np.testing.assert_array_equal(cleared, jnp.asarray(np.where(ids[..., None, None] < 0, 0, x), dtype))


def test_segment_ids_from_cu_seqlens():
    one = segment_ids_from_cu_seqlens(jnp.array([1, 4, 4, 6]), 8)
    assert one.dtype == jnp.int32
    assert one.tolist() == [[-1, 0, 0, 0, 2, 2, -1, -1]]
    several = jax.jit(segment_ids_from_cu_seqlens, static_argnums=1)(np.array([[0, 2, 5], [0, 5, 5]], np.uint32), 5)
    assert several.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert segment_ids_from_cu_seqlens(np.array([0]), 3).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    ("cu_seqlens", "length", "error", "message"),
    [
        (np.array([0.0, 4.0]), 4, TypeError, "cu_seqlens: expected an integer dtype, got float64"),
        (np.zeros((1, 1, 2), int), 4, ValueError, r"cu_seqlens: expected shape .* got \[1, 1, 2\]"),
        (np.zeros(0, int), 4, ValueError, r"cu_seqlens: expected shape .* got \[0\]"),
        (np.array([0, 4]), 0, ValueError, "length: expected at least 1, got 0"),
        (np.array([0, 4]), 4.0, TypeError, r"length: expected an int, got 4.0 \(float\)"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, length, error, message):
    with pytest.raises(error, match=message):
        segment_ids_from_cu_seqlens(cu_seqlens, length)
