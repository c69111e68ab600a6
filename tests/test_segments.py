import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import segment_ids_from_cu_seqlens, segments

LENGTH = 61


def random_ids(seed):
    """Ids [3, LENGTH] of runs of 1 to 16 tokens, a third of them padding; the last row is all padding."""
    rng = np.random.default_rng(seed)
    ids = np.stack([np.repeat(rng.integers(-2, 5, LENGTH), rng.integers(1, 17, LENGTH))[:LENGTH] for _ in range(3)])
    ids[2] = -1
    return ids.astype(np.int32)


def runs_of(row):
    """[(start, stop)] of the runs of equal ids."""
    runs = []
    for t, number in enumerate(row):
        if t and row[t - 1] == number:
            runs[-1] = (runs[-1][0], t + 1)
        else:
            runs.append((t, t + 1))
    return runs


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


def pairs(intervals):
    """{(b, query, key)} from the queries' side, and from the keys'."""
    intervals = jax.tree.map(np.asarray, intervals)
    by_query = {
        (b, t, key)
        for b, t in np.ndindex(intervals.key_begin.shape)
        for key in range(intervals.key_begin[b, t], intervals.key_end[b, t])
    }
    by_key = {
        (b, t, key)
        for b, key in np.ndindex(intervals.query_begin.shape)
        for t in range(intervals.query_begin[b, key], intervals.query_end[b, key])
    }
    return by_query, by_key


@pytest.mark.parametrize("window_size", [0, 1, 5, 2**40])
def test_sliding_intervals(ids, window_size):
    expected = {
        (b, t, key)
        for b, row in enumerate(ids)
        for start, stop in runs_of(row)
        for t in range(start, stop)
        for key in range(max(start, t - window_size + 1), t + 1)
        if row[t] >= 0
    }
    by_query, by_key = pairs(segments.sliding_intervals(segments.layout(jnp.asarray(ids), *ids.shape), window_size))
    assert by_query == by_key == expected


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 4), (8, 4), (6, 2), (64, 16), (64, 64)])
def test_windows(ids, window, stride):
    tokens = segments.layout(jnp.asarray(ids), *ids.shape)
    starts = np.full((3, LENGTH // stride), -1)
    expected = set()
    for b, row in enumerate(ids):
        slot = 0
        for start, stop in runs_of(row):
            for first in range(start, stop - window + 1, stride):
                if row[start] >= 0:
                    starts[b, slot] = first
                    expected |= {(b, t, slot) for t in range(first + window - 1, stop)}
                    slot += 1
    np.testing.assert_array_equal(segments.window_starts(tokens, window, stride), starts)
    by_query, by_key = pairs(segments.window_intervals(tokens, window, stride))
    assert by_query == by_key == expected


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_blocks(ids, block_size):
    most = segments.most_blocks(jnp.asarray(ids), LENGTH, block_size)
    blocks = segments.blocks(segments.layout(jnp.asarray(ids), *ids.shape), block_size, most)
    for b, row in enumerate(ids):
        spans = [
            (first, min(first + block_size, stop))
            for start, stop in runs_of(row)
            for first in range(start, stop, block_size)
        ]
        assert blocks.count[b] == len(spans)
        empty = [(0, 0)] * (most - len(spans))
        assert list(zip(blocks.begin[b].tolist(), blocks.end[b].tolist(), strict=True)) == spans + empty
        numbers = [number for number, (begin, end) in enumerate(spans) for _ in range(begin, end)]
        assert blocks.number[b].tolist() == numbers


def test_most_blocks_bounds_every_packing():
    assert segments.most_blocks(None, 65, 16) == 5
    ids = jnp.arange(65, dtype=jnp.int32)[None]
    assert segments.most_blocks(ids, 65, 16) == segments.blocks(segments.layout(ids, 1, 65), 16, 65).count[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_clear_padding(ids, dtype):
    x = np.random.default_rng(0).integers(1, 100, (*ids.shape, 2, 3))
    cleared = segments.clear_padding(jnp.asarray(x, dtype), jnp.asarray(ids))
    assert cleared.dtype == dtype
    np.testing.assert_array_equal(cleared, jnp.asarray(np.where(ids[..., None, None] < 0, 0, x), dtype))
    assert segments.clear_padding(x, None) is x


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
        (np.array([0.0, 4.0]), 4, TypeError, "cu_seqlens: expected an integer dtype, got float32"),
        (np.zeros((1, 1, 2), int), 4, ValueError, r"cu_seqlens: expected shape .* got \[1, 1, 2\]"),
        (np.zeros(0, int), 4, ValueError, r"cu_seqlens: expected shape .* got \[0\]"),
        (np.array([0, 4]), 0, ValueError, "length: expected a positive int, got 0"),
        (np.array([0, 4]), 4.0, ValueError, "length: expected a positive int, got 4.0"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, length, error, message):
    with pytest.raises(error, match=message):
        segment_ids_from_cu_seqlens(cu_seqlens, length)
