"""Chunking never shows: tokens that go into a cache in any chunks give what the whole row gives at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_small_error_ratio, branch_gates, qkv

import nsa_jax

B, N, H, K, V, BLOCK = 2, 4, 2, 16, 8, 16
CAPACITY, PAGE = 112, 32
RATIO = 2e-5  # relative root-mean-square error: float32 sums in another order
OPTIONS = {"block_counts": 3, "window_size": 20, "num_local_blocks": 1}
WINDOWS = {"l=d": (16, 16), "overlapping": (16, 4)}


def empty(window=16, stride=16, paged=False, capacity=CAPACITY, batch=B, dtype=jnp.float32):
    """A cache of NaN; pages lie in any order."""
    page = PAGE if paged else None
    capacity = -(-capacity // PAGE) * PAGE if paged else capacity
    cache = nsa_jax.init_cache(
        batch, capacity, H, K, V, block_size=BLOCK, compression_window=window, compression_stride=stride, dtype=dtype,
        page_size=page,
    )  # fmt: skip
    if paged:
        order = np.random.default_rng(0).permutation(cache.key.shape[0]).astype(np.int32)
        cache = dataclasses.replace(cache, page_indices=jnp.asarray(order.reshape(batch, -1)))
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else jnp.full_like(x, jnp.nan), cache)


def inputs(T, dtype=jnp.float32, batch=B):
    """Query, key, value and the gates by name."""
    return *qkv(T, batch, T, N, H, K, V, dtype=dtype), branch_gates(T, batch, T, N, dtype=dtype)


@functools.partial(jax.jit, static_argnames="implementation")
def step(cache, query, key, value, gates, lengths=None, compressed=None, implementation="xla"):
    cache = nsa_jax.extend_cache(cache, key, value, lengths=lengths, compressed=compressed)
    return cache, nsa_jax.cached_attention(query, cache, implementation=implementation, **gates, **OPTIONS)


def whole(query, key, value, gates, window=16, stride=16, **options):
    options = {"implementation": "xla", **OPTIONS, **options}
    return nsa_jax.native_sparse_attention(
        query, key, value, block_size=BLOCK, compression_window=window, compression_stride=stride, **gates, **options
    )


def in_chunks(cache, chunks, query, key, value, gates, **options):
    """(cache, outputs) of chunks of so many tokens."""
    outputs, at = [], 0
    for size in chunks:
        part = lambda x, at=at, size=size: x[:, at : at + size]  # noqa: E731
        cache, output = step(cache, part(query), part(key), part(value), jax.tree.map(part, gates), **options)
        outputs.append(output)
        at += size
    return cache, jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_any_chunks_give_the_whole_row(windows, paged):
    arrays = inputs(CAPACITY)
    expected = whole(*arrays, *windows)
    for chunks in ([1] * 3 + [37] * 2 + [1] * 35, [CAPACITY])[: 1 if paged else 2]:
        assert sum(chunks) == CAPACITY
        cache, output = in_chunks(empty(*windows, paged), chunks, *arrays)
        assert_small_error_ratio([output], [expected], RATIO)
        assert cache.length.tolist() == [CAPACITY] * B


@pytest.mark.parametrize("branch", ["compressed", "selected", "sliding"])
def test_each_branch_alone(branch):
    query, key, value, gates = inputs(90)
    gates = {f"{branch}_gate": gates[f"{branch}_gate"]}
    expected = whole(query, key, value, gates, 16, 8)
    _, output = in_chunks(empty(16, 8), [71, *[1] * 19], query, key, value, gates)
    # a block picked otherwise would be off by a third
    assert_small_error_ratio([output], [expected], RATIO)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("tokens", [3, 12])
def test_kernels(tokens, paged):
    *arrays, gates = inputs(60)
    expected = whole(*arrays, gates, 16, 8)
    cache, _ = in_chunks(empty(16, 8, paged, capacity=80), [40], *(x[:, :40] for x in arrays), _cut(gates, 0, 40))
    part = slice(40, 40 + tokens)
    _, output = step(cache, *(x[:, part] for x in arrays), _cut(gates, 40, tokens), implementation="triton")
    assert_small_error_ratio([output], [expected[:, part]], RATIO)


def _cut(gates, first, count):
    return {name: gate[:, first : first + count] for name, gate in gates.items()}


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_rows_of_lengths_of_their_own(implementation):
    T = 70
    *arrays, gates = inputs(T)
    cache, taken = empty(16, 8, paged=implementation == "xla"), np.zeros(B, int)
    outputs = np.full((B, T, N, V), np.nan, np.float32)
    for lengths in ([40, 25], [1, 0], [0, 1], [9, 40], [20, 4]):
        size = max(lengths)
        places = taken[:, None] + np.arange(size)
        is_token = np.arange(size) < np.array(lengths)[:, None]

        def take(x, places=places, is_token=is_token):  # NaN beyond the row's lengths
            taken = np.take_along_axis(
                np.asarray(x), np.minimum(places, T - 1).reshape(*places.shape, *[1] * (x.ndim - 2)), 1
            )
            return jnp.asarray(np.where(is_token.reshape(*places.shape, *[1] * (x.ndim - 2)), taken, np.nan))

        lengths_array = jnp.asarray(lengths, jnp.int32)
        cache, output = step(
            cache, *map(take, arrays), jax.tree.map(take, gates), lengths_array, implementation=implementation
        )
        output = np.asarray(output)
        assert not output[~is_token].any()
        for row in range(B):
            outputs[row, places[row][is_token[row]]] = output[row][is_token[row]]
        taken += lengths
    assert cache.length.tolist() == taken.tolist() == [70, 70]
    assert_small_error_ratio([outputs], [whole(*arrays, gates, 16, 8)], RATIO)


def test_half_precision():
    query, key, value, gates = inputs(CAPACITY, jnp.bfloat16)
    _, output = in_chunks(empty(16, 8, dtype=jnp.bfloat16), [50, *[1] * 12, 50], query, key, value, gates)
    assert output.dtype == jnp.bfloat16
    assert_small_error_ratio([output], [whole(query, key, value, gates, 16, 8)], 0.005)


def test_long_chunks_go_through_in_parts():
    T = 600
    query, key, value, gates = inputs(T, batch=1)
    counts = jnp.asarray(np.random.default_rng(0).integers(0, 4, (1, T, H)), jnp.int32)
    options = {"block_counts": counts, "max_block_count": 3, "window_size": 20}
    expected = whole(query, key, value, gates, **options)
    cache = nsa_jax.extend_cache(empty(batch=1, capacity=T), key, value)
    output = nsa_jax.cached_attention(query, cache, **gates, **options, num_local_blocks=1)
    assert_small_error_ratio([output], [expected], RATIO)


def test_a_map_of_ones_own():
    """Compressed keys that are given, of windows that became complete, in place of means."""
    window, stride, T = 16, 8, 100
    query, key, value, gates = inputs(T)
    pooled = [np.asarray(nsa_jax.gather_windows(x, window=window, stride=stride).max(axis=2)) for x in (key, value)]
    own = dict(zip(("compressed_key", "compressed_value"), pooled, strict=True))
    expected = whole(query, key, value, gates, window, stride, **own)
    cache, outputs, at = empty(window, stride), [], 0
    for size in [9, 1, 9, 9, *[1] * 18, 9, 9, 9, 9, 9, 9]:
        part = slice(at, at + size)
        before = max(0, (at - window) // stride + 1)
        most = -(-size // stride)
        new = [np.pad(x[:, before : before + most], ((0, 0), (0, most), (0, 0), (0, 0)))[:, :most] for x in pooled]
        arrays = [x[:, part] for x in (query, key, value)]
        cache, output = step(cache, *arrays, _cut(gates, at, size), compressed=tuple(new))
        outputs.append(output)
        at += size
    assert at == T
    assert_small_error_ratio([jnp.concatenate(outputs, axis=1)], [expected], RATIO)


def test_a_smaller_length_forgets():
    *arrays, gates = inputs(90)
    expected = whole(*arrays, gates, 16, 8)
    cache, _ = in_chunks(empty(16, 8), [20] * 3, *(x[:, :60] for x in arrays), _cut(gates, 0, 60))
    # drafts that are refused, over the end of a window; row 0 keeps two tokens, row 1 four
    draft = [x[:, 60:80].at[0, 2:].set(9.0).at[1, 4:].set(9.0) for x in arrays]
    cache, _ = step(cache, *draft, _cut(gates, 60, 20))
    cache = dataclasses.replace(cache, length=jnp.asarray([62, 64], jnp.int32))
    rest = [jnp.stack([x[0, 62:82], x[1, 64:84]]) for x in arrays]
    rest_gates = {name: jnp.stack([x[0, 62:82], x[1, 64:84]]) for name, x in gates.items()}
    _, output = step(cache, *rest, rest_gates)
    assert_small_error_ratio([output], [jnp.stack([expected[0, 62:82], expected[1, 64:84]])], RATIO)


class TestNoRoom:
    @pytest.mark.parametrize("paged", [False, True], ids=["capacity", "page"])
    def test_the_token_is_nan_and_nothing_else_changes(self, paged):
        """Row 0 has room for 2 tokens of 5, row 1 for all."""
        *arrays, gates = inputs(75)
        expected = whole(*arrays, gates, 16, 8)
        cache = empty(16, 8, paged, capacity=64)
        first = ([62, 30], [x[:, :62] for x in arrays], _cut(gates, 0, 62))
        if paged:
            cache = empty(16, 8, True, capacity=96)
            pages = cache.page_indices
            cache = dataclasses.replace(cache, page_indices=pages.at[0, 2].set(-1))
        cache, _ = step(cache, *first[1], first[2], jnp.asarray(first[0], jnp.int32))

        def rows(x):
            return jnp.stack([x[0, 62:67], x[1, 30:35]])

        new, output = step(cache, *map(rows, arrays), jax.tree.map(rows, gates))
        assert new.length.tolist() == [64, 35]
        lost = np.isnan(np.asarray(output)).reshape(B, 5, -1)
        assert lost.all(axis=-1).tolist() == lost.any(axis=-1).tolist() == [[False] * 2 + [True] * 3, [False] * 5]
        kept = jnp.concatenate([output[0, :2], output[1]])
        assert_small_error_ratio([kept], [jnp.concatenate([expected[0, 62:64], expected[1, 30:35]])], RATIO)
        changed = [
            int((np.isnan(a) != np.isnan(b)).any(axis=(2, 3)).sum())
            for a, b in ((cache.key, new.key), (cache.compressed_key, new.compressed_key))
        ]
        assert changed == [7, 2]  # 2 and 5 tokens, and the windows that 64 and 32 tokens complete
        same = ~np.isnan(cache.key)
        np.testing.assert_array_equal(np.asarray(new.key)[same], np.asarray(cache.key)[same])

        again, output = step(new, *map(rows, arrays), jax.tree.map(rows, gates), jnp.asarray([1, 0], jnp.int32))
        assert again.length.tolist() == [64, 35] and np.isnan(output[0, 0]).all() and not np.asarray(output[1]).any()
        if paged:  # the page comes, and the lost tokens once more
            again = dataclasses.replace(again, page_indices=pages)
            _, output = step(again, *(x[:, 64:70] for x in arrays), _cut(gates, 64, 6), jnp.asarray([6, 0], jnp.int32))
            assert_small_error_ratio([output[0]], [expected[0, 64:70]], RATIO)

    def test_it_raises_outside_of_jit(self):
        key, value = (jnp.zeros((B, 5, H, D)) for D in (K, V))
        cache = dataclasses.replace(empty(), length=jnp.asarray([9, CAPACITY - 4], jnp.int32))
        message = f"cache: expected room for 5 more tokens in row 1 of length 108, but the capacity is {CAPACITY}"
        with pytest.raises(ValueError, match=message):
            nsa_jax.extend_cache(cache, key, value)
        nsa_jax.extend_cache(cache, key, value, lengths=jnp.asarray([5, 4]))
        paged = empty(paged=True)
        paged = dataclasses.replace(paged, page_indices=paged.page_indices.at[0, 0].set(paged.key.shape[0]))
        message = "room for 5 more tokens in row 0 of length 0, but page_indices are unset from token 0 on"
        with pytest.raises(ValueError, match=message):
            nsa_jax.extend_cache(paged, key, value)

    def test_fewer_queries_than_were_appended(self):
        key, value = (jnp.ones((B, 5, H, D)) for D in (K, V))
        cache = nsa_jax.extend_cache(empty(), key, value, lengths=jnp.asarray([5, 2]))
        query = jnp.ones((B, 3, N, K))
        attend = functools.partial(nsa_jax.cached_attention, sliding_gate=1.0)
        with pytest.raises(ValueError, match="query: expected the 5 tokens that were last appended, got 3 tokens"):
            attend(query, cache)
        output = np.isnan(jax.jit(attend)(query, cache)).all(axis=(2, 3))
        assert output.tolist() == [[True] * 3, [False] * 3]


def test_gradients_are_those_of_the_whole_row():
    *arrays, gates = inputs(40)

    def chunked(query, key, value):
        cache = jax.tree.map(lambda x: jnp.zeros_like(x), empty(16, 8))
        return jnp.square(in_chunks(cache, [30, 10], query, key, value, gates)[1]).sum()

    def at_once(query, key, value):
        return jnp.square(whole(query, key, value, gates, 16, 8)).sum()

    actual, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arrays) for f in (chunked, at_once))
    assert_small_error_ratio(actual, expected, RATIO)


CACHE = nsa_jax.init_cache(B, 64, H, K, V, block_size=16, dtype=jnp.float32)
PAGED = nsa_jax.init_cache(B, 64, H, K, V, block_size=16, dtype=jnp.float32, page_size=32)
ZEROS = {"key": jnp.zeros((B, 3, H, K)), "value": jnp.zeros((B, 3, H, V)), "query": jnp.zeros((B, 3, N, K))}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: nsa_jax.init_cache(1, 0, 1, 8), ValueError, "capacity: expected at least 1, got 0"),
        (lambda: nsa_jax.init_cache(1, 8, 1, 6), ValueError, "key_width: expected a multiple of 4"),
        (lambda: nsa_jax.init_cache(1, 8, 1, 8, dtype=int), TypeError, "dtype: expected bfloat16, float16 or float32"),
        (
            lambda: nsa_jax.init_cache(1, 64, 1, 8, block_size=32, page_size=16),
            ValueError,
            "page_size: expected a multiple of block_size = 32, got 16",
        ),
        (
            lambda: nsa_jax.init_cache(1, 65, 1, 8, block_size=32, page_size=32),
            ValueError,
            "capacity: expected a multiple of page_size = 32, got 65",
        ),
        (lambda: nsa_jax.init_cache(1, 64, 1, 8, num_pages=3), ValueError, "page_size: expected .* got None"),
        (lambda: _extend(cache=3), TypeError, "cache: expected a KVCache, got int"),
        (lambda: _extend(key=jnp.zeros((B, 3, N, K))), ValueError, "key: expected shape .2, Tq, 2, 16., got"),
        (
            lambda: _extend(key=ZEROS["key"].astype(jnp.bfloat16)),
            TypeError,
            "key: expected the dtype of cache, flo",
        ),
        (lambda: _extend(value=ZEROS["key"]), ValueError, "value: expected shape .2, 3, 2, 8., got"),
        (lambda: _extend(lengths=jnp.zeros(B)), TypeError, "lengths: expected an integer dtype, got float32"),
        (lambda: _extend(lengths=np.array([3, 4])), ValueError, "lengths: expected 0 to the 3 tokens of key, got 4 in"),
        (lambda: _extend(compressed=3), TypeError, "compressed: expected a pair of keys and values, got int"),
        (
            lambda: _extend(compressed=(ZEROS["key"], ZEROS["value"])),
            ValueError,
            "compressed keys: expected shape .2, 1, 2, 16., got",
        ),
        (lambda: _extend(cache=PAGED), ValueError, "cache: expected room for 3 more tokens in row 0"),
        (
            lambda: _extend(cache=dataclasses.replace(PAGED, page_indices=None)),
            TypeError,
            "cache.page_indices: expected an array",
        ),
        (lambda: _attend(), ValueError, "expected at least one gate"),
        (
            lambda: _attend(ZEROS["query"][:, :, :3], sliding_gate=1.0),
            ValueError,
            "query: expected N heads, a multiple",
        ),
        (lambda: _attend(sliding_gate=jnp.ones((B, 3, H))), ValueError, "sliding_gate: expected shape"),
        (lambda: _attend(sliding_gate=1.0, implementation="cuda"), ValueError, "implementation: expected None"),
    ],
)
def test_messages(function, error, message):
    with pytest.raises(error, match=message):
        function()


def _extend(cache=CACHE, key=ZEROS["key"], value=ZEROS["value"], **options):
    return nsa_jax.extend_cache(cache, key, value, **options)


def _attend(query=ZEROS["query"], cache=CACHE, **options):
    return nsa_jax.cached_attention(query, cache, **options)
