"""The original project's test of its online top-k: what the kernel selects against the top of a dense score matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import packing, qkv, spans

from nsa_jax import compress, compressed_attention, select_blocks

# A score of size up to 100 carries 2^-24 * 100 of rounding, and its exponential as much relative to itself.
TOLERANCE = 2e-5


def importances(query, key, lse, first, block_size):
    """[T, H, J] of one segment whose windows are its blocks; `first` is the slot of its first window."""
    T, N, K = query.shape
    H, blocks = key.shape[1], -(-T // block_size)
    complete = T // block_size
    key = np.asarray(key[first : first + complete], np.float64)
    scores = np.einsum("thgk,jhk->thgj", np.asarray(query, np.float64).reshape(T, H, N // H, K), key) * K**-0.5
    probability = np.exp(scores - np.asarray(lse, np.float64).reshape(T, H, N // H, 1)).sum(2)
    visible = (np.arange(complete) + 1) * block_size <= np.arange(T)[:, None] + 1
    return np.pad(np.where(visible[:, None], probability, 0.0), ((0, 0), (0, 0), (0, blocks - complete)))


def check(T, N, H, D, S, block_size, dtype, packed):
    segment_ids = packing(T) if packed else None
    B = 2 if packed else 1
    query, key, value = qkv(T + D, B, T, N, H, D, D, dtype=dtype)
    key, value = (compress(x, window=block_size, stride=block_size, segment_ids=segment_ids) for x in (key, value))
    options = {"window": block_size, "stride": block_size, "segment_ids": segment_ids}
    _, lse = compressed_attention(query, key, value, implementation="xla", return_residual=True, **options)
    chosen = select_blocks(query, key, lse, block_counts=S, block_size=block_size, implementation="triton", **options)
    chosen = np.asarray(jax.device_get(chosen))
    for b in range(B):
        slot = 0
        for start, stop in spans(np.asarray(segment_ids[b])) if packed else [(0, T)]:
            score = importances(query[b, start:stop], key[b], lse[b, start:stop], slot, block_size)
            slot += (stop - start) // block_size
            own = np.arange(stop - start)[:, None, None] // block_size
            block = np.arange(score.shape[-1])
            # the first block and the last two are always taken, none comes after the query's own
            score = np.where((block == 0) | (own - block < 2), np.inf, score)
            score = np.where(block > own, -np.inf, score)
            score = np.pad(score, ((0, 0), (0, 0), (0, max(S - score.shape[-1], 0))), constant_values=-np.inf)
            best = -np.sort(-score, axis=-1)[..., :S]
            mine = chosen[b, start:stop]
            got = np.where(mine >= 0, np.take_along_axis(score, np.maximum(mine, 0), -1), -np.inf)
            np.testing.assert_allclose(-np.sort(-got, axis=-1), best, rtol=TOLERANCE, atol=1e-30)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T, N, H, D, S, block_size", [(60, 64, 4, 32, 2, 16), (100, 16, 1, 100, 3, 16)])
def test_online_topk(T, N, H, D, S, block_size, packed):
    check(T, N, H, D, S, block_size, jnp.float32, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T, D, S", [(256, 100, 16), (1024, 64, 16), (2000, 64, 16), (2000, 100, 8)])
def test_online_topk_in_bfloat16(T, D, S, packed):
    check(T, 64, 4, D, S, 32, jnp.bfloat16, packed)
