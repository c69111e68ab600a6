"""Random shapes, packings, dtypes and options: "triton" against "xla", and "xla" against the paper's equations."""

import functools

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
from cases import assert_close, branch_gates, normal, qkv, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_jax import native_sparse_attention

BRANCHES = ("compressed", "selected", "sliding")
# What rounding the results to the dtype leaves, and its share of the sums that the backward pass subtracts.
TOLERANCES = {"float32": 1e-5, "float16": 2**-9, "bfloat16": 2**-6}

repeatable = functools.partial(settings, derandomize=True, deadline=None, database=None)


@st.composite
def problems(draw, longest, dtypes=("float32",)):
    """(arguments of native_sparse_attention by name: the differentiable ones, the others)."""
    B, T, H, G = (
        draw(st.integers(1, 2)),
        draw(st.just(longest) | st.integers(1, longest)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    K, V = (4 * draw(st.integers(1, 6)) for _ in range(2))
    block_size = draw(st.sampled_from([16, 32]))
    stride = draw(st.sampled_from([size for size in (2, 4, 8, 16, 32) if size <= block_size]))
    window = stride * draw(st.integers(1, block_size // stride))
    branches = draw(st.lists(st.sampled_from(BRANCHES), min_size=1, unique=True))
    seed = draw(st.integers(0, 2**16))
    runs = draw(st.none() | st.lists(st.tuples(st.integers(-1, 2), st.integers(1, longest)), min_size=1, max_size=5))
    dtype = draw(st.sampled_from(dtypes))

    arrays = dict(zip(("query", "key", "value"), qkv(seed, B, T, H * G, H, K, V), strict=True))
    gates = branch_gates(seed, B, T, H * G)
    arrays |= {f"{name}_gate": gates[f"{name}_gate"] for name in BRANCHES if name in branches}
    if runs is None:
        segment_ids = None
    else:
        ids = np.concatenate([np.full(length, number, np.int32) for number, length in runs])
        segment_ids = np.resize(ids, (B, T))
    return {name: x.astype(dtype) for name, x in arrays.items()}, {
        "block_size": block_size,
        "block_counts": draw(st.integers(0, 3)),
        "window_size": draw(st.sampled_from([0, 1, 5, block_size, block_size + 1, longest, 1000])),
        "compression_window": window,
        "compression_stride": stride,
        "num_init_blocks": draw(st.integers(0, 2)),
        "num_local_blocks": draw(st.integers(1, 2)),
        "scale": draw(st.sampled_from([0.2, 1.0])),
        "segment_ids": segment_ids,
    }


def attention(implementation, segment_ids, **options):
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return functools.partial(native_sparse_attention, segment_ids=segment_ids, implementation=implementation, **options)


@repeatable(max_examples=8)
@given(problems(longest=40, dtypes=tuple(TOLERANCES)))
def test_triton_equals_xla(problem):
    arrays, options = problem
    query, value = arrays["query"], arrays["value"]
    cotangent = normal(0, *query.shape[:3], value.shape[-1], dtype=query.dtype)
    actual, expected = (
        value_and_gradients(attention(name, **options), arrays, cotangent) for name in ("triton", "xla")
    )
    assert_close(actual, expected, TOLERANCES[query.dtype.name])


@repeatable(max_examples=15)
@given(problems(longest=80))
def test_xla_follows_the_equations(problem):
    arrays, options = problem
    actual = jax.jit(lambda arrays: attention("xla", **options)(**arrays))(arrays)
    none = np.zeros(arrays["query"].shape[:3])
    names = {"compression_window": "window", "compression_stride": "stride"}
    expected = brute_force.native_sparse_attention(
        *(np.asarray(arrays[name]) for name in ("query", "key", "value")),
        *(np.asarray(arrays.get(f"{name}_gate", none)) for name in BRANCHES),
        **{names.get(name, name): value for name, value in options.items()},
    )
    assert_close([actual], [expected.astype(np.float32)])
