"""The compressed and the sliding branch's Gluon kernels for Hopper GPUs against plain jnp, in bfloat16 and float16."""

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
    branch_gates,
    float32_of,
    normal,
    packing,
    qkv,
    row,
    run,
    spans,
    value_and_gradients,
    without_infinities,
)

from nsa_jax import (
    compress,
    compressed_attention,
    interval,
    interval_hopper,
    launch,
    native_sparse_attention,
    sliding_window_attention,
    tiling,
)

# T, window_size, G, H, K, V, dtype, packed
SLIDING = [
    (1, 4, 16, 1, 128, 128, "bfloat16", False),
    (63, 7, 1, 2, 64, 128, "bfloat16", True),
    (257, 64, 16, 2, 128, 64, "bfloat16", True),
    (333, 1, 2, 3, 64, 64, "float16", True),
    (500, 100, 4, 2, 128, 128, "bfloat16", True),
    (515, 2000, 8, 1, 64, 64, "float16", False),
    (130, 33, 64, 1, 128, 128, "bfloat16", True),
    (129, 50, 128, 1, 128, 128, "bfloat16", True),
    (1031, 512, 16, 4, 128, 128, "bfloat16", False),
    (700, 300, 32, 1, 128, 128, "bfloat16", True),
]
# T, window, stride, G, H, K, V, dtype, packed
COMPRESSED = [
    (17, 4, 2, 16, 1, 128, 128, "bfloat16", False),
    (257, 16, 16, 16, 2, 128, 64, "bfloat16", True),
    (515, 2, 1, 2, 2, 64, 128, "float16", True),
    (1031, 4, 4, 16, 4, 128, 128, "bfloat16", False),
    (600, 8, 4, 64, 1, 128, 128, "bfloat16", True),
    (300, 3, 1, 128, 1, 64, 64, "bfloat16", True),
    (4099, 8, 8, 1, 1, 128, 128, "bfloat16", True),
]


@pytest.fixture
def hopper(hopper, monkeypatch):
    monkeypatch.setattr(tiling, "INTERVAL_HOPPER_KEYS", 0)  # the forward kernel for short rows too


def sliding(implementation, **options):
    options = {"implementation": implementation, "return_residual": True, **options}
    return functools.partial(sliding_window_attention, **options)


def compressed(implementation, **options):
    options = {"implementation": implementation, "return_residual": True, **options}
    return functools.partial(compressed_attention, **options)


def assert_matches_reference(attention, arrays, options, packed):
    query, _, value = arrays
    assert interval_hopper.fits(query, value, options["scale"])
    (B, T, N, _), V = query.shape, value.shape[3]
    cotangents = normal(1, B, T, N, V, dtype=query.dtype), normal(2, B, T, N)
    attend = attention("triton", **options)
    actual = run(attend, arrays, cotangents=cotangents)
    expected = run(attention("xla", **options), float32_of(arrays), cotangents=float32_of(cotangents))
    np.testing.assert_array_equal(np.isinf(actual[1]), np.isinf(expected[1]))
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), RATIO)
    assert_same_bits(run(attend, arrays, cotangents=cotangents), actual)
    if packed:
        for result in (actual[0], *actual[2:]):
            np.testing.assert_array_equal(np.asarray(result[1], np.float32), 0.0)  # a row of padding


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SLIDING, ids=str)
def test_sliding_matches_reference(hopper, shape):
    T, window_size, G, H, K, V, dtype, packed = shape
    options = {"window_size": window_size, "segment_ids": packing(T) if packed else None, "scale": 0.1}
    arrays = qkv(T, 2 if packed else 1, T, G * H, H, K, V, dtype=dtype)
    assert_matches_reference(sliding, arrays, options, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", COMPRESSED, ids=str)
def test_compressed_matches_reference(hopper, shape):
    T, window, stride, G, H, K, V, dtype, packed = shape
    options = {"window": window, "stride": stride, "segment_ids": packing(T) if packed else None, "scale": 0.1}
    arrays = qkv(T, 2 if packed else 1, T, G * H, H, K, V, C=T // stride, dtype=dtype)
    assert_matches_reference(compressed, arrays, options, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [None, "compressed_gate", "selected_gate"])
@pytest.mark.parametrize("G, K, V, dtype", [(16, 128, 128, "bfloat16"), (8, 128, 64, "float16")])
def test_gated_sum_in_the_sliding_kernel(hopper, monkeypatch, dropped, G, K, V, dtype):
    monkeypatch.setattr(launch, "multiprocessors", lambda: 4)  # many units to a program, which reuses shared memory
    T, H = 333, 2
    query, key, value = qkv(T, 2, T, G * H, H, K, V, dtype=dtype)
    gates = {name: gate for name, gate in branch_gates(3, 2, T, G * H, dtype).items() if name != dropped}
    windows = {"window": 16, "stride": 16, "segment_ids": packing(T)}
    arrays = {"query": query, "key": key, "value": value, **gates}
    if dropped != "compressed_gate":
        arrays |= {"compressed_key": compress(key, **windows), "compressed_value": compress(value, **windows)}
    options = {
        "window_size": 150, "block_size": 64, "compression_window": 16, "compression_stride": 16,
        "segment_ids": packing(T), "block_counts": 3,
    }  # fmt: skip
    options["block_indices"] = jnp.asarray(np.random.default_rng(4).integers(0, 6, (2, T, H, 3)), jnp.int32)
    spec = interval.Spec("sliding", K**-0.5, "ieee", reach=150)
    assert interval.adds_up(query, key, value, spec)
    cotangent = normal(9, *query.shape[:3], V, dtype=dtype)

    def attend(implementation):
        return functools.partial(native_sparse_attention, implementation=implementation, **options)

    actual = value_and_gradients(attend("triton"), arrays, cotangent)
    wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    expected = value_and_gradients(attend("xla"), wide, cotangent.astype(jnp.float32))
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), RATIO)
    np.testing.assert_array_equal(np.asarray(actual[0][1], np.float32), 0.0)  # a row of padding
    # without gradients the branch's own output is not written
    assert_same_bits([jax.jit(attend("triton"))(**arrays)], actual[:1])


@pytest.mark.gpu
def test_packed_equals_alone(hopper):
    T, G = 700, 16
    segment_ids = row(T, (-1, 3), (0, 333), (1, 1), (-1, 5), (0, 270), (-1, 88))[None]
    arrays = qkv(2, 1, T, G, 1, 128, 128, dtype="bfloat16")
    cotangents = normal(5, 1, T, G, 128, dtype="bfloat16"), normal(6, 1, T, G)
    packed = run(
        sliding("triton", window_size=100, segment_ids=jnp.asarray(segment_ids)), arrays, cotangents=cotangents
    )
    for start, stop in spans(segment_ids[0]):
        alone, weights = (tuple(x[:, start:stop] for x in group) for group in (arrays, cotangents))
        expected = run(sliding("triton", window_size=100), alone, cotangents=weights)
        # the same sums in another order: the rounding of bfloat16
        assert_close([x[:, start:stop] for x in packed], expected, tolerance=2**-7)


@pytest.mark.gpu
def test_what_lies_behind_a_row_is_not_read(hopper):
    T, G = 75, 16  # the last tiles end beyond the row, where the next row begins
    arrays = qkv(3, 2, T, G, 1, 128, 128, dtype="bfloat16")
    cotangents = normal(5, 2, T, G, 128, dtype="bfloat16"), normal(6, 2, T, G)
    poisoned, poisoned_cotangents = (tuple(x.at[1].set(jnp.nan) for x in group) for group in (arrays, cotangents))
    attend = sliding("triton", window_size=20)
    actual = run(attend, poisoned, cotangents=poisoned_cotangents)
    for a, e in zip(actual, run(attend, arrays, cotangents=cotangents), strict=True):
        np.testing.assert_array_equal(np.asarray(a[0], np.float32), np.asarray(e[0], np.float32))


@pytest.mark.gpu
def test_vmap_equals_a_loop(hopper):
    T, G = 90, 16
    arrays = qkv(5, 1, T, G, 1, 64, 64, dtype="bfloat16")
    queries = jnp.stack([arrays[0], 2 * arrays[0] - 1])

    def everything(query):
        return run(sliding("triton", window_size=30), (query, *arrays[1:]))

    mapped = jax.vmap(everything)(queries)
    for i in range(2):
        assert_same_bits([x[i] for x in mapped], everything(queries[i]))


def test_where_they_are_used():
    def used(capability=90, widths=(128, 128), itemsize=2, group=16):
        return tiling.interval_hopper(capability, widths, itemsize, group)

    assert all(used(group=group, widths=(64, 128)) for group in (1, 2, 4, 8, 16, 32, 64, 128))
    for other in (
        {"capability": tiling.INTERPRETER}, {"capability": 80}, {"capability": 100}, {"itemsize": 4}, {"group": 12},
        {"group": 256}, {"widths": (192, 128)}, {"widths": (128, 32)},
    ):  # fmt: skip
        assert not used(**other), other


@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
def test_rings_fit(widths):
    K, V = widths
    slot, room = 2 * 64 * (K + V), 1024 * tiling.SHARED_MEMORY[90]
    forward, keys = tiling.interval_hopper_stages(K, V), tiling.hopper_keys_stages(K, V)
    assert min(forward, keys) >= 2
    assert forward * slot + 2 * 2 * tiling.INTERVAL_HOPPER_ROWS * K < room
    assert 2 * (keys + 1) * slot < room


def test_shares():
    assert tiling.interval_hopper_shares(64, 2**20, 0) == 32
    assert tiling.interval_hopper_shares(1, 2**20, 0) == 64
    assert tiling.interval_hopper_shares(1, 1000, 0) == 1
    assert tiling.interval_hopper_shares(1, 2**20, 512) == 1
