import functools
import itertools

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nsa_jax.compression import compress, gather_windows

# (T, window, stride)
SHAPES = [(1, 1, 1), (17, 4, 2), (40, 8, 8), (63, 12, 4), (70, 32, 16), (7, 8, 4), (3, 8, 4)]


def draw(length, seed=0):
    return np.random.default_rng(seed).standard_normal((2, length, 3, 4)).astype(np.float32)


def packing(length, seed=1):
    """Segment ids [2, length] of runs of 1 to 24 tokens, some of them padding; row 1 begins and ends with padding."""
    rng = np.random.default_rng(seed)
    ids = np.stack([np.repeat(rng.integers(-1, 6, length), rng.integers(1, 25, length))[:length] for _ in range(2)])
    ids[1, :2] = ids[1, -2:] = -5
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("window", "stride"))
def both(x, segment_ids, window, stride):
    options = {"window": window, "stride": stride, "segment_ids": segment_ids}
    return compress(x, **options), gather_windows(x, **options)


def expected_windows(x, ids, window, stride):
    windows = np.zeros((2, x.shape[1] // stride, window, *x.shape[2:]), x.dtype)
    for b in range(2):
        spans = brute_force.window_spans(brute_force.segment_bounds(ids, b, x.shape[1]), window, stride)
        for slot, (first, last) in enumerate(itertools.chain(*spans)):
            windows[b, slot] = x[b, first:last]
    return windows


@pytest.mark.parametrize(("length", "window", "stride"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_their_mean(length, window, stride, packed):
    x, ids = draw(length), packing(length) if packed else None
    mean, windows = both(x, ids, window, stride)
    np.testing.assert_array_equal(windows, expected_windows(x, ids, window, stride))
    # a float32 mean of at most 32 terms of order 1
    expected = brute_force.compress(x, window=window, stride=stride, segment_ids=ids)
    np.testing.assert_allclose(mean, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("length", "window", "stride"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(length, window, stride, packed):
    x, ids = draw(length), packing(length) if packed else None
    cotangents = jax.tree.map(lambda y: draw_like(y, 2), both(x, ids, window, stride))
    gradients = [
        jax.jit(lambda x, g, i=i: jax.vjp(lambda x: both(x, ids, window, stride)[i], x)[1](g)[0])(x, cotangents[i])
        for i in range(2)
    ]
    expected = np.zeros((2, *x.shape))
    for b in range(2):
        spans = brute_force.window_spans(brute_force.segment_bounds(ids, b, length), window, stride)
        for slot, (first, last) in enumerate(itertools.chain(*spans)):
            expected[0, b, first:last] += cotangents[0][b, slot] / window
            expected[1, b, first:last] += cotangents[1][b, slot]
    # float32 sums of at most three terms
    np.testing.assert_allclose(gradients, expected, rtol=2e-6, atol=2e-6)


def draw_like(x, seed):
    return np.random.default_rng(seed).standard_normal(x.shape).astype(x.dtype)


def test_low_precision_is_float32_inside():
    x = jnp.asarray(draw(63), jnp.bfloat16)
    for ids in (None, packing(63)):
        mean, windows = both(x, ids, 12, 4)
        assert mean.dtype == windows.dtype == jnp.bfloat16
        exact, _ = both(x.astype(jnp.float32), ids, 12, 4)
        np.testing.assert_array_equal(mean, exact.astype(jnp.bfloat16))


def test_nothing_in_padding_reaches_a_window():
    x, ids = draw(63), packing(63)
    clean = both(x, ids, 8, 4)
    x[ids < 0] = np.nan
    jax.tree.map(np.testing.assert_array_equal, clean, both(x, ids, 8, 4))
    for i in range(2):
        gradient = jax.jit(jax.grad(lambda x, i=i: both(x, ids, 8, 4)[i].sum()))(x)
        assert np.isfinite(gradient).all()
        assert not gradient[ids < 0].any()
        assert gradient.any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", [compress, gather_windows])
def test_no_scatter_add_in_the_gradient(function, packed):
    ids = packing(63) if packed else None
    options = {"window": 8, "stride": 4, "segment_ids": ids}
    traced = lambda f: str(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(draw(63)))  # noqa: E731
    assert "scatter-add" in traced(lambda x: x[:, np.array([3, 3])])
    assert "scatter-add" not in traced(functools.partial(function, **options))


def energy(x, ids):
    return sum((y**2).sum() for y in both(x, ids, 8, 4))


def test_vmap():
    x, ids = np.stack([draw(40, 3), draw(40, 4)]), np.stack([packing(40, 5), packing(40, 6)])
    gradient = jax.jit(jax.grad(energy))
    mapped = jax.jit(jax.vmap(jax.grad(energy)))(x, ids)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], gradient(x[i], ids[i]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["x by rows", "x on every device"])
@pytest.mark.parametrize("packed", [False, True])
def test_shard_map(packed, shared):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    x, ids = draw(40), packing(40) if packed else None
    rows = PartitionSpec("rows")
    x_spec = PartitionSpec() if shared else rows
    # the types say whether a shared x's gradient is summed over the devices: an out_spec that is not theirs raises
    gradient = jax.shard_map(jax.grad(across_rows), mesh=mesh, in_specs=(x_spec, rows), out_specs=x_spec)
    np.testing.assert_allclose(jax.jit(gradient)(x, ids), jax.grad(energy)(x, ids), rtol=1e-6, atol=1e-6)


def across_rows(x, ids):
    total = energy(x, ids)
    return jax.lax.psum(total, "rows") if jax.typeof(total).manual_axis_type.varying else total


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": np.zeros((2, 8, 4), np.float32)}, ValueError, r"x: expected shape \[B, T, H, D\], got \[2, 8, 4\]"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"stride": 2.0}, TypeError, "stride: expected an int, got 2.0"),
        ({"stride": 3}, ValueError, "stride: expected a divisor of window = 4, got 3"),
        ({"segment_ids": np.zeros((2, 8), np.float32)}, TypeError, "segment_ids: expected an integer dtype"),
        (
            {"segment_ids": np.zeros((2, 9), np.int32)},
            ValueError,
            r"segment_ids: expected shape \[2, 8\], got \[2, 9\]",
        ),
    ],
)
@pytest.mark.parametrize("function", [compress, gather_windows])
def test_bad_arguments(function, changed, error, message):
    options = {"x": np.zeros((2, 8, 1, 4), np.float32), "window": 4, "stride": 2, "segment_ids": None} | changed
    with pytest.raises(error, match=message):
        function(options.pop("x"), **options)
