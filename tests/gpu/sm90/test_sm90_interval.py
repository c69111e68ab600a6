"""The compressed and the sliding branch's Gluon kernels for Hopper GPUs against plain jnp, in bfloat16 and float16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    RATIO,
    assert_same_bits,
    assert_small_error_ratio,
    branch_gates,
    normal,
    packing,
    qkv,
    value_and_gradients,
    without_infinities,
)

from nsa_jax import compress, native_sparse_attention, tiling
from nsa_jax.gpu import backends
from nsa_jax.gpu.sm90 import interval, key_pass
from nsa_jax.runtime import device


@pytest.fixture
def hopper(hopper, monkeypatch):
    monkeypatch.setattr(interval, "FEWEST_SEEN", 0)  # the forward kernel for short rows too


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [None, "compressed_gate", "selected_gate"])
@pytest.mark.parametrize("G, K, V, dtype", [(16, 128, 128, "bfloat16"), (8, 128, 64, "float16")])
def test_gated_sum_in_the_sliding_kernel(hopper, monkeypatch, dropped, G, K, V, dtype):
    monkeypatch.setattr(device, "multiprocessors", lambda: 4)  # many units to a program, which reuses shared memory
    T, H = 333, 2
    query, key, value = qkv(T, 2, T, G * H, H, K, V, dtype=dtype)
    gates = {name: gate for name, gate in branch_gates(3, 2, T, G * H, dtype).items() if name != dropped}
    windows = {"window": 16, "stride": 16, "segment_ids": packing(T)}
    arrays = {"query": query, "key": key, "value": value, **gates}
    if dropped != "compressed_gate":
        arrays |= {"compressed_key": compress(key, **windows), "compressed_value": compress(value, **windows)}
    options = {"window_size": 150, "block_size": 64, "block_counts": 3, "segment_ids": packing(T)}
    options |= {"compression_window": 16, "compression_stride": 16}
    options["block_indices"] = jnp.asarray(np.random.default_rng(4).integers(0, 6, (2, T, H, 3)), jnp.int32)
    assert backends.interval(query, value, K**-0.5) is interval
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


def test_where_they_are_used():
    def used(capability=90, widths=(128, 128), itemsize=2, group=16):
        return interval.is_for(capability, widths, itemsize, group)

    assert all(used(group=group, widths=(64, 128)) for group in (1, 2, 4, 8, 16, 32, 64, 128))
    assert not any(used(capability=other) for other in (tiling.INTERPRETER, 80, 100))
    assert not any(used(group=other) for other in (12, 256))
    assert not any(used(widths=other) for other in ((192, 128), (128, 32)))
    assert not used(itemsize=4)


@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
def test_rings_fit(widths):
    K, V = widths
    slot, room = 2 * 64 * (K + V), 1024 * tiling.SHARED_MEMORY[90]
    forward, keys = interval.forward_stages(K, V), key_pass.stages(K, V)
    assert min(forward, keys) >= 2
    assert forward * slot + 2 * 2 * 192 * K < room
    assert 2 * (keys + 1) * slot < room


def test_splits():
    assert interval.splits_of(64, 2**20, 0) == 32
    assert interval.splits_of(1, 2**20, 0) == 64
    assert interval.splits_of(1, 1000, 0) == 1
    assert interval.splits_of(1, 2**20, 512) == 1
