"""Sliding-window attention: the Triton kernels against plain jnp, outputs, lse and every gradient."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, normal, packing, qkv, run, spans

from nsa_jax import sliding_window_attention

# T, window_size, G, H, K, V, packed
SHAPES = [
    (1, 4, 3, 1, 16, 16, False),
    (17, 5, 32, 1, 16, 8, True),
    (17, 1, 16, 1, 16, 16, True),
    (63, 200, 6, 1, 100, 32, False),
    (63, 16, 8, 1, 4, 20, True),
    (63, 9, 3, 2, 16, 100, True),
    (100, 33, 4, 1, 192, 128, True),
    (257, 32, 2, 1, 32, 16, True),
    (257, 257, 1, 1, 16, 16, False),
]


def attention(implementation, window_size, segment_ids=None, **options):
    return functools.partial(
        sliding_window_attention,
        window_size=window_size,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residual=True,
        **options,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    T, window_size, G, H, K, V, packed = shape
    segment_ids = packing(T) if packed else None
    arrays = qkv(T, 2 if packed else 1, T, G * H, H, K, V)
    actual, expected = (run(attention(name, window_size, segment_ids), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    if packed:
        for result in actual[2:]:
            np.testing.assert_array_equal(result[1], 0.0)  # a row of padding


def test_scale():
    arrays = qkv(0, 1, 40, 2, 1, 16, 16)
    actual, expected = (run(attention(name, 7, scale=0.5), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    assert np.abs(actual[0] - run(attention("triton", 7), arrays)[0]).max() > 0.1


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_window_of_zero_sees_nothing(implementation):
    output, lse, *gradients = run(attention(implementation, 0), qkv(0, 1, 20, 2, 1, 16, 8))
    assert output.shape == (1, 20, 2, 8)
    np.testing.assert_array_equal(output, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_packed_equals_alone(implementation):
    T, window_size = 90, 24
    segment_ids = packing(T)[:1]
    arrays = qkv(2, 1, T, 4, 2, 16, 8)
    cotangents = normal(5, 1, T, 4, 8), normal(6, 1, T, 4)
    packed = run(attention(implementation, window_size, segment_ids), arrays, cotangents=cotangents)
    for start, stop in spans(np.asarray(segment_ids[0])):
        alone, weights = (tuple(x[:, start:stop] for x in group) for group in (arrays, cotangents))
        expected = run(attention(implementation, window_size), alone, cotangents=weights)
        assert_close([x[:, start:stop] for x in packed], expected)


def test_other_segments_keep_their_bits():
    T = 90
    segment_ids = packing(T)[:1]
    start, stop = max(spans(np.asarray(segment_ids[0])), key=lambda span: span[1] - span[0])
    inside = (np.arange(T) >= start) & (np.arange(T) < stop)
    arrays = qkv(3, 1, T, 4, 2, 16, 8)
    cotangents = normal(5, 1, T, 4, 8), normal(6, 1, T, 4)
    changed = [jnp.where(inside.reshape(1, T, *(1,) * (x.ndim - 2)), 3 * x + 1, x) for x in (*arrays, *cotangents)]
    attend = attention("triton", 24, segment_ids)
    before = run(attend, arrays, cotangents=cotangents)
    after = run(attend, tuple(changed[:3]), cotangents=tuple(changed[3:]))
    assert_same_bits([x[:, ~inside] for x in after], [x[:, ~inside] for x in before])
    assert not np.array_equal(after[0], before[0])


def test_same_bits_twice():
    arrays = qkv(4, 2, 70, 6, 2, 16, 8)
    attend = attention("triton", 30, packing(70))
    assert_same_bits(run(attend, arrays), run(attend, arrays))
