"""The original project's test of its parallel_nsa: blocks given by the user, with counts, gates and a short window."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_small_error_ratio, branch_gates, normal, qkv, row, value_and_gradients

from nsa_jax import native_sparse_attention

# Float32 sums of some hundred products, and ten bits lost in d_query to cancellation between keys of one sign.
FLOAT32_RATIO = 1e-4
BFLOAT16_RATIO = 0.005


def shuffled(seed, T, N, D):
    """[1, T, N, D]: equal steps from 0 to 1 in a random order, the same for every head and column."""
    steps = np.random.default_rng(seed).permutation(np.linspace(0, 1, T, dtype=np.float32))
    return jnp.asarray(np.broadcast_to(steps.reshape(1, T, 1, 1), (1, T, N, D)))


def starts_of(segment_ids, T):
    index = np.arange(T)
    if segment_ids is None:
        return np.zeros(T, int)
    return np.maximum.accumulate(np.where(np.r_[True, segment_ids[1:] != segment_ids[:-1]], index, 0))


def choose(seed, T, H, S, block_size, segment_ids):
    """(block_indices, block_counts): different complete blocks, ascending, then T; how many of them count."""
    rng = np.random.default_rng(seed)
    indices = np.full((1, T, H, S), T, np.int32)
    for t, position in enumerate(np.arange(T) - starts_of(segment_ids, T)):
        for h in range(H):
            blocks = rng.permutation(max(1, -(-position // block_size)))[:S]
            indices[0, t, h, : len(blocks)] = np.sort(blocks)
    return jnp.asarray(indices), jnp.asarray(rng.integers(1, S + 1, (1, T, H)), jnp.int32)


def check(T, N, H, D, S, block_size, window_size, dtype, *, ratio, spread, scale=0.1, segment_ids=None):
    """Compares the kernels with the float32 reference, outputs and every gradient."""
    inputs = [shuffled(i, T, n, D) for i, n in enumerate((N, H, H))] if spread == "steps" else qkv(0, 1, T, N, H, D, D)
    gates = branch_gates(5, 1, T, N)
    arrays = dict(zip(("query", "key", "value"), inputs, strict=True)) | {
        name: gates[name] for name in ("selected_gate", "sliding_gate")[: 2 if window_size else 1]
    }
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    cotangent = normal(6, 1, T, N, D, dtype=dtype)
    indices, counts = choose(7, T, H, S, block_size, segment_ids)
    attend = functools.partial(
        native_sparse_attention,
        block_indices=indices,
        block_counts=counts,
        block_size=block_size,
        window_size=window_size,
        scale=scale,
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids[None]),
    )
    actual = value_and_gradients(functools.partial(attend, implementation="triton"), arrays, cotangent)
    expected = value_and_gradients(
        functools.partial(attend, implementation="xla"),
        {name: x.astype(jnp.float32) for name, x in arrays.items()},
        cotangent.astype(jnp.float32),
    )
    assert all(x.dtype == dtype for x in actual)
    assert_small_error_ratio(actual, expected, ratio)


def four_segments(T):
    """Segment ids [T] of four segments that end anywhere, at 16 or later."""
    cuts = np.sort(np.random.default_rng(T).choice(np.arange(16, T), 3, replace=False))
    return np.searchsorted(cuts, np.arange(T), side="right").astype(np.int32)


@pytest.mark.parametrize("T, D, window_size", [(40, 20, 0), (33, 16, 16)])
def test_parallel(T, D, window_size):
    check(T, 4, 2, D, 3, 16, window_size, jnp.float32, ratio=FLOAT32_RATIO, spread="steps")


@pytest.mark.parametrize("T, D, window_size", [(44, 16, 0), (41, 20, 16)])
def test_parallel_varlen(T, D, window_size):
    segment_ids = row(T, (0, T // 2), (1, 1), (2, T // 3), (3, 1))
    check(T, 4, 1, D, 4, 16, window_size, jnp.float32, ratio=FLOAT32_RATIO, spread="steps", segment_ids=segment_ids)


# In bfloat16 the inputs are normal. With steps from 0 to 1 rounding the output alone, which the backward pass must
# subtract, puts d_query 8 % off: all keys have one sign, and almost everything cancels.


def test_bfloat16():
    check(40, 4, 1, 16, 3, 16, 16, jnp.bfloat16, ratio=BFLOAT16_RATIO, spread="normal")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, spread, ratio", [(jnp.bfloat16, "normal", BFLOAT16_RATIO), (jnp.float32, "steps", FLOAT32_RATIO)]
)
@pytest.mark.parametrize("window_size", [0, 32])
@pytest.mark.parametrize("D", [100, 64])
@pytest.mark.parametrize("T", [256, 1024, 2000])
def test_parallel_of_full_size(T, D, window_size, dtype, spread, ratio):
    check(T, 64, 4, D, 16, 32, window_size, dtype, ratio=ratio, spread=spread)


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", [0, 32])
@pytest.mark.parametrize("D", [100, 64])
@pytest.mark.parametrize("T", [64, 128, 200, 250, 256, 300, 400, 512, 1000, 2048])
def test_parallel_varlen_of_full_size(T, D, window_size):
    check(
        T, 64, 4, D, 16, 32, window_size, jnp.bfloat16,
        ratio=BFLOAT16_RATIO, spread="normal", scale=None, segment_ids=four_segments(T),
    )  # fmt: skip
