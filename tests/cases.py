"""What the tests of the ops share: inputs, packings, and comparison of outputs and gradients."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.runtime import launch

# Float32 sums of some hundred products in another order: 2^-24 times about 100, relative to the largest element.
TOLERANCE = 1e-5

# Root-mean-square error of 16-bit kernels, relative to float32: what the original's tests ask of theirs.
RATIO = 0.005


def normal(seed, *shape, dtype=np.float32):
    """Independent standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(seed, B, T, N, H, K, V, C=None, dtype=np.float32):
    """Query [B, T, N, K], key [B, C, H, K], value [B, C, H, V]; C is T unless given."""
    C = T if C is None else C
    shapes = ((B, T, N, K), (B, C, H, K), (B, C, H, V))
    return tuple(normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def row(T, *runs):
    """Segment ids [T] from runs (id, length); the last is cut, or stretched, to end at T."""
    ids = np.concatenate([np.full(length, number, np.int32) for number, length in runs])[:T]
    return np.concatenate([ids, np.full(T - len(ids), runs[-1][0], np.int32)])


def packing(T):
    """Segment ids [2, T]: padding at both ends and in the middle, segments of length 1, any ends; a row of padding."""
    third = max(T // 3, 1)
    mixed = row(
        T, (-1, 2), (4, 1), (5, 1), (4, third), (-7, 3), (-1, 2), (0, third), (9, max(T - 2 * third - 13, 1)), (-1, 4)
    )
    return jnp.asarray(np.stack([mixed, np.full(T, -1, np.int32)]))


def spans(ids):
    """[(start, stop)] of the segments of a row of ids, padding left out."""
    edges = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1]), len(ids)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if ids[start] >= 0]


def counts_of(kind, B, T, H, S):
    """block_counts: `kind` as it is, or for "array" numbers [B, T, H] from below 0 to above S."""
    if kind != "array":
        return kind
    return jnp.asarray(np.random.default_rng(T).integers(-1, S + 2, (B, T, H)), jnp.int32)


def run(attend, arrays, seed=100, cotangents=None):
    """(output, lse, *gradients) of attend(*arrays) -> (output, lse), for random cotangents of both."""

    @jax.jit
    def everything(arrays, cotangents):
        results, pullback = jax.vjp(attend, *arrays)
        return *results, *pullback(cotangents)

    if cotangents is None:
        output, lse = jax.eval_shape(attend, *arrays)
        cotangents = normal(seed, *output.shape, dtype=output.dtype), normal(seed + 1, *lse.shape)
    return everything(arrays, cotangents)


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Arrays equal up to `tolerance` of the largest expected element, infinities exactly."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        infinite = np.isinf(e)
        np.testing.assert_array_equal(a[infinite], e[infinite], err_msg=f"result {i}")
        a, e = a[~infinite], e[~infinite]
        error = np.abs(a - e).max(initial=0.0)
        assert error <= tolerance * max(1.0, np.abs(e).max(initial=0.0)), f"result {i}: off by {error}"


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def branch_gates(seed, B, T, N, dtype=np.float32):
    """The gates of native_sparse_attention by name, [B, T, N] from 0 to 1."""
    drawn = np.random.default_rng(seed).random((3, B, T, N))
    return dict(zip(("compressed_gate", "selected_gate", "sliding_gate"), jnp.asarray(drawn, dtype), strict=True))


def value_and_gradients(function, arrays, cotangent):
    """[output, *gradients] of function(**arrays) for the output's cotangent; gradients in the order of their names."""

    @jax.jit
    def everything(arrays, cotangent):
        output, pullback = jax.vjp(lambda arrays: function(**arrays), arrays)
        return output, *pullback(cotangent)

    output, gradients = everything(arrays, cotangent)
    return [output, *(gradients[name] for name in sorted(gradients))]


def float32_of(arrays):
    return tuple(x.astype(jnp.float32) for x in arrays)


def without_infinities(arrays):
    """The arrays in float32, with zeros for infinities."""
    return [jnp.where(jnp.isinf(x), 0.0, jnp.asarray(x, jnp.float32)) for x in arrays]


def assert_small_error_ratio(actual, expected, ratio):
    """The root-mean-square error of each array at most `ratio` times the root-mean-square of what is expected."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error, size = (np.sqrt(np.mean(x**2)) for x in (a - e, e))
        assert error <= ratio * size, f"result {i}: error {error} of {size}"


def count_launches(function, *arrays):
    """Kernels in a lowered function: custom calls on a GPU, callbacks in the interpreter."""
    return len(
        re.findall(r"custom_call @\w*(?:triton_kernel_call|callback)", jax.jit(function).lower(*arrays).as_text())
    )


def launch_alone(kernel, *arrays, warps=4, **options):
    """What a kernel gives that is launched by itself; options: as `launch.launch` takes them."""
    return launch.launch(kernel, *arrays, name="test", warps=warps, stages=1, flops=0, **options)
