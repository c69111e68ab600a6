"""Integers of any dtype are compared whole; ints of any size and NumPy's are taken; no rows; gates as numbers."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, branch_gates, qkv, run

import nsa_jax
from nsa_jax import checks

T = 40
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
HUGE = 10**400
PLAIN = functools.partial(nsa_jax.sliding_window_attention, window_size=9, implementation="xla")


@pytest.fixture(params=["NumPy", "JAX", "JAX with 64 bits"])
def array_of(request):
    """(numbers, dtype) -> an array, in a context where JAX has or lacks 64 bits."""
    wide = jax.enable_x64(True) if request.param == "JAX with 64 bits" else contextlib.nullcontext()
    with wide:
        kind = np.asarray if request.param == "NumPy" else jnp.asarray
        yield lambda numbers, dtype: kind(np.asarray(numbers, dtype))


def holds_64_bits(array):
    return array.dtype.itemsize == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_ids_are_compared_whole(array_of, dtype):
    most, unsigned = np.iinfo(dtype).max, dtype.startswith("u")
    low = 2 ** (np.iinfo(dtype).bits // 2)  # ids that agree in their lower half
    different = np.asarray([5, 5 + low, most, most - 1, 7 if unsigned else -1, 5], dtype)
    numbers = np.repeat(different, [9, 8, 7, 6, 4, 6])[None]
    ids = array_of(numbers, dtype)
    if dtype.endswith("64") and not holds_64_bits(ids):
        pytest.skip("JAX has no 64 bits here")
    checked = np.asarray(checks.segment_ids(ids, 1, T))
    assert checked.dtype == np.int32
    np.testing.assert_array_equal(checked[:, 1:] != checked[:, :-1], numbers[:, 1:] != numbers[:, :-1])
    np.testing.assert_array_equal(checked < 0, numbers < 0)
    if isinstance(ids, jax.Array):  # JAX narrows NumPy's before they are traced
        traced = jax.jit(lambda ids: checks.segment_ids(ids, 1, T))(ids)
        np.testing.assert_array_equal(traced, checked)


def test_segments_of_64_bits_are_not_merged():
    arrays = qkv(0, 1, T, 2, 1, 8, 8)
    ids = np.repeat([5, 5 + 2**32, 5 - 2**63, 2**31 + 5], 10)[None]
    renamed = np.repeat([0, 1, -1, 3], 10)[None].astype(np.int32)
    results = [run(functools.partial(PLAIN, segment_ids=x, return_residual=True), arrays) for x in (ids, renamed)]
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_indices_and_counts_are_never_narrowed(array_of, dtype):
    query, key, _ = qkv(0, 1, T, 2, 1, 8, 8)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    odd = [x for x in (2**32, 2**32 + 1, 2**31, 2**63 + 1, most, least, -1) if least <= x <= most]
    far = np.asarray(odd, dtype)[np.arange(T) % len(odd)]
    if dtype.endswith("64") and not holds_64_bits(array_of(far, dtype)):
        pytest.skip("JAX has no 64 bits here")

    indices = checks.block_indices(array_of(np.broadcast_to(far.reshape(1, T, 1, 1), (1, T, 1, 2)), dtype), query, key)
    counts = checks.block_counts(array_of(far.reshape(1, T, 1), dtype), query, key)
    places = checks.query_indices(array_of(far[None], dtype), query)
    for checked in (indices[0, :, 0, 0], counts[0, :, 0], places[0]):
        assert checked.dtype == jnp.int32
        nearest = [min(max(int(x), -(2**31)), 2**31 - 1) for x in far]
        assert checked.tolist() == nearest


@pytest.mark.parametrize("dtype", DTYPES)
def test_cu_seqlens_of_any_dtype(array_of, dtype):
    ends = [1, 4, 4, 6]
    assert nsa_jax.segment_ids_from_cu_seqlens(array_of(ends, dtype), 8).tolist() == [[-1, 0, 0, 0, 2, 2, -1, -1]]
    beyond = array_of([1, 127], dtype)
    assert nsa_jax.segment_ids_from_cu_seqlens(beyond, 8).tolist() == [[-1] + [0] * 7]


def test_cu_seqlens_of_64_bits_are_not_narrowed():
    ends = np.array([0, 2**32 + 1, 2**32 + 3])
    assert nsa_jax.segment_ids_from_cu_seqlens(ends, 8).tolist() == [[0] * 8]


def native(**options):
    arrays = dict(zip(("query", "key", "value"), qkv(0, 1, T, 2, 1, 8, 8), strict=True))
    options = {"block_size": 16, "implementation": "xla", **branch_gates(3, 1, T, 2)} | options
    return jax.jit(lambda arrays: nsa_jax.native_sparse_attention(**arrays, **options))(arrays)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_huge_windows_and_counts_mean_all(implementation):
    huge = {"window_size": HUGE, "block_counts": HUGE, "num_init_blocks": HUGE, "num_local_blocks": HUGE}
    few = {"window_size": T, "block_counts": 3, "num_init_blocks": 3, "num_local_blocks": 3}
    options = {"implementation": implementation}
    assert_same_bits([native(**huge, **options)], [native(**few, **options)])
    assert_same_bits([native(**huge, max_block_count=HUGE, **options)], [native(**few, **options)])


def test_numpy_integers_are_ints():
    numbers = {"window_size": 9, "block_counts": 2, "num_init_blocks": 1, "num_local_blocks": 1, "max_block_count": 2}
    numbers |= {"block_size": 16, "compression_window": 8, "compression_stride": 4}
    expected = native(**numbers)
    for kind in (np.int8, np.uint16, np.int64):
        assert_same_bits(
            [native(**{name: kind(x) for name, x in numbers.items()}, scale=np.float64(8**-0.5))], [expected]
        )


def test_a_window_longer_than_the_row():
    _, key, _ = qkv(0, 1, T, 2, 1, 8, 8)
    for window, stride in ((64, 1), (10**4, 1), (2**40, 2**40)):
        memory = jax.jit(functools.partial(nsa_jax.compress, window=window, stride=stride)).lower(key).compile()
        assert memory.memory_analysis().temp_size_in_bytes < 2**20
        assert not np.asarray(nsa_jax.compress(key, window=window, stride=stride)).any()


def test_gates_as_numbers():
    ones = jnp.ones((1, T, 2))
    drawn = branch_gates(3, 1, T, 2)["sliding_gate"]
    for number in (0.25, 1, np.float32(0.5), np.int64(2), 0):
        gates = {"compressed_gate": number, "selected_gate": None, "sliding_gate": drawn}
        as_array = {**gates, "compressed_gate": ones * float(number)}
        assert_same_bits([native(**gates)], [native(**as_array)])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("sliced", [False, True])
def test_no_rows(implementation, sliced):
    """Shapes, of outputs and gradients."""
    query, key, value = qkv(0, 0, T, 2, 1, 8, 8)
    options = {"implementation": implementation, "query_indices": jnp.zeros((0, T), jnp.int32) if sliced else None}
    options["segment_ids"] = jnp.zeros((0, T), jnp.int32) if sliced else None
    gates = {f"{name}_gate": jnp.zeros((0, T, 2)) for name in ("compressed", "selected", "sliding")}
    windows = {"window": 8, "stride": 4}

    @jax.jit
    def everything(query, key, value):
        def of(query, key, value):
            compressed = [nsa_jax.compress(x, **windows) for x in (key, value)]
            attended, lse = nsa_jax.compressed_attention(query, *compressed, return_residual=True, **windows, **options)
            blocks = nsa_jax.select_blocks(query, compressed[0], lse, block_size=16, **windows, **options)
            return (
                nsa_jax.native_sparse_attention(query, key, value, block_size=16, **gates, **options)
                + nsa_jax.selected_attention(query, key, value, blocks, block_size=16, **options)
                + nsa_jax.sliding_window_attention(query, key, value, window_size=5, **options)
                + attended
            )

        output, pullback = jax.vjp(of, query, key, value)
        return output, *pullback(output)

    assert [x.shape for x in everything(query, key, value)] == [query.shape, query.shape, key.shape, value.shape]


def test_scale_of_any_number():
    arrays = qkv(0, 1, T, 2, 1, 8, 8)
    assert_close([PLAIN(*arrays, scale=2)], [PLAIN(*arrays, scale=np.float32(2.0))])
    assert not np.isnan(PLAIN(*arrays, scale=0)).any()
    for scale in (HUGE, -HUGE, np.nan):
        with pytest.raises(ValueError, match="scale: expected a finite number, got ") as caught:
            PLAIN(*arrays, scale=scale)
        assert len(str(caught.value)) < 300
