"""Compressed attention: the Triton kernels against plain jnp, outputs, lse and every gradient."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, normal, packing, qkv, row, run, spans

from nsa_jax import compressed_attention

# T, window, stride, G, H, K, V, packed
SHAPES = [
    (1, 16, 16, 3, 1, 16, 16, False),
    (17, 4, 2, 32, 1, 16, 8, True),
    (17, 16, 16, 16, 1, 16, 16, False),
    (63, 8, 4, 6, 1, 100, 32, True),
    (63, 4, 4, 8, 1, 4, 20, True),
    (63, 2, 1, 3, 2, 16, 100, True),
    (100, 32, 16, 4, 1, 192, 128, False),
    (257, 32, 16, 4, 1, 32, 16, True),
    (257, 4, 2, 1, 1, 16, 16, True),
    (257, 16, 16, 2, 1, 16, 16, False),
]


def attention(implementation, window, stride, segment_ids=None, **options):
    return functools.partial(
        compressed_attention,
        window=window,
        stride=stride,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residual=True,
        **options,
    )


def window_count(length, window, stride):
    return max(0, (length - window) // stride + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    T, window, stride, G, H, K, V, packed = shape
    segment_ids = packing(T) if packed else None
    arrays = qkv(T, 2 if packed else 1, T, G * H, H, K, V, C=T // stride)
    actual, expected = (run(attention(name, window, stride, segment_ids), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    if packed:
        for result in actual[2:]:
            np.testing.assert_array_equal(result[1], 0.0)  # a row of padding


def test_scale():
    arrays = qkv(0, 1, 40, 2, 1, 16, 16, C=10)
    actual, expected = (run(attention(name, 4, 4, scale=0.5), arrays) for name in ("triton", "xla"))
    assert_close(actual, expected)
    assert np.abs(actual[0] - run(attention("triton", 4, 4), arrays)[0]).max() > 0.1


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("T", [10, 20], ids=["no slot", "no window"])
def test_row_shorter_than_a_window_sees_nothing(T, implementation):
    output, lse, *gradients = run(attention(implementation, 32, 16), qkv(0, 2, T, 2, 1, 16, 8, C=T // 16))
    assert output.shape == (2, T, 2, 8)
    np.testing.assert_array_equal(output, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_packed_equals_alone(implementation):
    T, window, stride = 90, 8, 4
    segment_ids = row(T, (-1, 3), (0, 33), (1, 1), (2, 7), (-1, 2), (0, 29), (5, 12), (-1, 3))[None]
    arrays = qkv(2, 1, T, 4, 2, 16, 8, C=T // stride)
    cotangents = normal(5, 1, T, 4, 8), normal(6, 1, T, 4)
    attend = attention(implementation, window, stride, jnp.asarray(segment_ids))
    output, lse, d_query, d_key, d_value = run(attend, arrays, cotangents=cotangents)
    slot = 0
    for start, stop in spans(segment_ids[0]):
        count, slots = window_count(stop - start, window, stride), (stop - start) // stride
        windows = [jnp.pad(x[:, slot : slot + count], ((0, 0), (0, slots - count), (0, 0), (0, 0))) for x in arrays[1:]]
        alone = run(
            attention(implementation, window, stride),
            (arrays[0][:, start:stop], *windows),
            cotangents=tuple(x[:, start:stop] for x in cotangents),
        )
        assert_close([x[:, start:stop] for x in (output, lse, d_query)], alone[:3])
        assert_close([x[:, slot : slot + count] for x in (d_key, d_value)], [x[:, :count] for x in alone[3:]])
        slot += count
    assert slot == 15  # 7 + 0 + 0 + 6 + 2


def test_other_segments_keep_their_bits():
    T, window, stride = 90, 8, 4
    segment_ids = row(T, (0, 33), (1, 29), (2, 28))
    inside, windows = segment_ids == 1, np.arange(T // stride)
    changed_slots = (windows >= 7) & (windows < 13)
    arrays = qkv(3, 1, T, 4, 2, 16, 8, C=T // stride)
    cotangents = normal(5, 1, T, 4, 8), normal(6, 1, T, 4)

    def change(x, where):
        return jnp.where(where.reshape(1, -1, *(1,) * (x.ndim - 2)), 3 * x + 1, x)

    changed = change(arrays[0], inside), change(arrays[1], changed_slots), change(arrays[2], changed_slots)
    attend = attention("triton", window, stride, jnp.asarray(segment_ids[None]))
    before = run(attend, arrays, cotangents=cotangents)
    after = run(attend, changed, cotangents=tuple(change(x, inside) for x in cotangents))
    assert_same_bits([x[:, ~inside] for x in after[:3]], [x[:, ~inside] for x in before[:3]])
    assert_same_bits([x[:, ~changed_slots] for x in after[3:]], [x[:, ~changed_slots] for x in before[3:]])
    assert not np.array_equal(after[0], before[0])


def test_same_bits_twice():
    arrays = qkv(4, 1, 257, 4, 1, 16, 8, C=16)  # the queries of a key tile are cut in two shares
    attend = attention("triton", 16, 16)
    assert_same_bits(run(attend, arrays), run(attend, arrays))
