"""Selected attention: the Triton kernels against plain jnp, outputs, lse and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, counts_of, normal, packing, qkv, row, run, spans

from nsa_jax import selected_attention
from nsa_jax.gpu import selected_keys
from nsa_jax.gpu.inverse import more_items

# T, block_size, S, counts, G, H, K, V, packed
SHAPES = [
    (1, 64, 4, None, 3, 1, 16, 16, False),
    (17, 16, 3, "array", 32, 1, 16, 8, True),
    (17, 16, 1, 1, 16, 1, 16, 16, True),
    (63, 32, 5, None, 6, 1, 100, 32, False),
    (33, 16, 3, 2, 8, 1, 4, 20, True),
    (63, 16, 1, "array", 3, 2, 16, 100, True),
    (100, 64, 1, None, 4, 1, 192, 128, False),
    (257, 128, 1, "array", 1, 1, 32, 16, True),
]


def drawn(seed, B, T, H, S, block_size):
    """Block indices: unsorted, with repeats, some negative, some beyond the query's own block, some the value T."""
    rng = np.random.default_rng(seed)
    own = np.arange(T).reshape(1, T, 1, 1) // block_size
    indices = rng.integers(-1, own + 2, (B, T, H, S))
    return jnp.asarray(np.where(rng.random(indices.shape) < 0.1, T, indices), jnp.int32)


def attention(implementation, indices, **options):
    options = {"block_size": 16, "block_indices": indices, "implementation": implementation, **options}
    return functools.partial(selected_attention, return_residual=True, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    T, block_size, S, counts, G, H, K, V, packed = shape
    B = 2 if packed else 1
    options = {"block_size": block_size, "segment_ids": packing(T) if packed else None, "scale": 0.3}
    options["block_counts"] = counts_of(counts, B, T, H, S)
    indices = drawn(T, B, T, H, S, block_size)
    arrays = qkv(T, B, T, G * H, H, K, V)
    actual, expected = (run(attention(name, indices, **options), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    if packed:
        for result in actual[2:]:
            np.testing.assert_array_equal(result[1], 0.0)  # a row of padding


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("S, counts", [(0, None), (2, 0), (2, "zeros")])
def test_no_block_sees_nothing(S, counts, implementation):
    indices = jnp.zeros((1, 20, 1, S), jnp.int32)
    counts = jnp.zeros((1, 20, 1), jnp.int32) if counts == "zeros" else counts
    arrays = qkv(0, 1, 20, 2, 1, 16, 8)
    output, lse, *gradients = run(attention(implementation, indices, block_counts=counts), arrays)
    assert output.shape == (1, 20, 2, 8)
    np.testing.assert_array_equal(output, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_only_the_set_of_blocks_matters(implementation):
    T = 40
    own = np.arange(T) // 16
    tidy = np.full((1, T, 1, 5), -1)
    untidy = np.full((1, T, 1, 5), T)  # the PyTorch original pads with T
    tidy[0, :, 0, 0] = 0
    tidy[0, own >= 2, 0, 1:3] = [1, 2]
    untidy[0, :, 0, 4] = 0
    untidy[0, own >= 2, 0, :4] = [2, 1, 2, 1]
    untidy[0, own == 1, 0, :3] = [-7, 2, 0]
    results = [
        run(attention(implementation, jnp.asarray(x, jnp.int32)), qkv(1, 1, T, 2, 1, 16, 8)) for x in (tidy, untidy)
    ]
    assert_same_bits(*results)


def test_packed_equals_alone():
    T = 60
    segment_ids = row(T, (-1, 2), (0, 33), (1, 1), (-1, 3), (0, 17), (-1, 4))[None]
    indices = drawn(2, 1, T, 1, 3, 16)
    arrays = qkv(2, 1, T, 2, 1, 16, 8)
    cotangents = normal(5, 1, T, 2, 8), normal(6, 1, T, 2)
    packed = [
        run(attention(name, indices, segment_ids=jnp.asarray(segment_ids)), arrays, cotangents=cotangents)
        for name in ("triton", "xla")
    ]
    for start, stop in spans(segment_ids[0]):
        alone, weights = (tuple(x[:, start:stop] for x in group) for group in (arrays, cotangents))
        expected = run(attention("xla", indices[:, start:stop]), alone, cotangents=weights)
        for results in packed:
            assert_close([x[:, start:stop] for x in results], expected)


def test_other_segments_keep_their_bits():
    T = 60
    segment_ids = row(T, (0, 22), (1, 19), (2, 19))
    inside = segment_ids == 1
    indices = drawn(3, 1, T, 1, 3, 16)
    arrays = qkv(3, 1, T, 2, 1, 16, 8)
    cotangents = normal(5, 1, T, 2, 8), normal(6, 1, T, 2)
    changed = [jnp.where(inside.reshape(1, T, *(1,) * (x.ndim - 2)), 3 * x + 1, x) for x in (*arrays, *cotangents)]
    # other blocks for its queries too: the others' places in the inverse index move
    other = jnp.where(inside.reshape(1, T, 1, 1), 0, indices)

    def attend(query, key, value, indices):
        return attention("triton", indices, segment_ids=jnp.asarray(segment_ids[None]))(query, key, value)

    def results(arrays, cotangents, indices):
        return run(functools.partial(attend, indices=indices), arrays, cotangents=cotangents)

    before = results(arrays, cotangents, indices)
    after = results(tuple(changed[:3]), tuple(changed[3:]), other)
    assert_same_bits([x[:, ~inside] for x in after], [x[:, ~inside] for x in before])
    assert not np.array_equal(after[0], before[0])


# What block 0 gets from so many queries: one item's worth, several items', and a row of many short segments' items,
# more than there are programs.
HOT = {"one item": (4, None), "several items": (40, None), "many blocks": (24, np.arange(24)[None] // 2)}


@pytest.mark.parametrize("T, segment_ids", HOT.values(), ids=HOT)
def test_hot_block(monkeypatch, T, segment_ids):
    monkeypatch.setattr(selected_keys, "chunk", lambda capability: 16)
    assert (more_items(T, T, 2, 16, 16, 48, sliced=False) > 0) == (T > 4)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    indices = jnp.zeros((1, T, 1, 2), jnp.int32)
    arrays = qkv(4, 1, T, 2, 1, 20, 16)
    actual, expected = (run(attention(name, indices, segment_ids=segment_ids), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    assert_same_bits(run(attention("triton", indices, segment_ids=segment_ids), arrays), actual)


def test_vmap_equals_a_loop():
    T = 20
    arrays = qkv(5, 1, T, 2, 1, 16, 8)
    queries = jnp.stack([arrays[0], 2 * arrays[0] - 1])
    indices = jnp.stack([drawn(seed, 1, T, 1, 2, 16) for seed in (0, 1)])

    def everything(query, indices):
        return run(attention("triton", indices), (query, *arrays[1:]))

    mapped = jax.vmap(everything)(queries, indices)
    for i in range(2):
        assert_close([x[i] for x in mapped], everything(queries[i], indices[i]))
