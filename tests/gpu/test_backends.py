"""The contract of the backends: each gives what plain jnp gives, the same bits twice, and no more under vmap.

A backend is a module per architecture, see nsa_jax/gpu/backends.py; to test another one, add its name and its rows.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    RATIO,
    assert_same_bits,
    assert_small_error_ratio,
    float32_of,
    normal,
    packing,
    qkv,
    run,
    without_infinities,
)

import nsa_jax
from nsa_jax.gpu import backends
from nsa_jax.gpu.sm90 import interval as sm90_interval

BACKENDS = ("portable", "sm90")

# T, queries, G, H, K, V, dtype, packed, options; of every branch one row that the interpreter can do
SLIDING = [
    (63, "any", 3, 1, 12, 20, "float32", True, {"window_size": 20}),
    (1, "all", 16, 1, 128, 128, "bfloat16", False, {"window_size": 4}),
    (63, "all", 1, 2, 64, 128, "bfloat16", True, {"window_size": 7}),
    (257, "any", 16, 2, 128, 64, "bfloat16", True, {"window_size": 64}),
    (333, "all", 2, 3, 64, 64, "float16", True, {"window_size": 1}),
    (515, "slice", 8, 1, 64, 64, "float16", False, {"window_size": 2000}),
    (129, "all", 128, 1, 128, 128, "bfloat16", True, {"window_size": 50}),
    (1031, "all", 16, 4, 128, 128, "bfloat16", False, {"window_size": 512}),
    (700, "any", 32, 1, 128, 128, "bfloat16", True, {"window_size": 300}),
]
COMPRESSED = [
    (63, "any", 3, 1, 12, 20, "float32", True, {"window": 8, "stride": 4}),
    (17, "all", 16, 1, 128, 128, "bfloat16", False, {"window": 4, "stride": 2}),
    (257, "any", 16, 2, 128, 64, "bfloat16", True, {"window": 16, "stride": 16}),
    (515, "all", 2, 2, 64, 128, "float16", True, {"window": 2, "stride": 1}),
    (1031, "slice", 16, 4, 128, 128, "bfloat16", False, {"window": 4, "stride": 4}),
    (600, "all", 64, 1, 128, 128, "bfloat16", True, {"window": 8, "stride": 4}),
    (4099, "all", 1, 1, 128, 128, "bfloat16", True, {"window": 8, "stride": 8}),
]
SELECTED = [
    (63, "any", 3, 1, 12, 20, "float32", True, {"block_size": 16}),
    (1, "all", 16, 1, 128, 128, "bfloat16", False, {"block_size": 64}),
    (63, "all", 8, 2, 64, 128, "bfloat16", True, {"block_size": 64}),
    (257, "any", 16, 2, 128, 64, "bfloat16", True, {"block_size": 32}),
    (333, "slice", 32, 1, 128, 128, "float16", False, {"block_size": 64}),
    (500, "all", 16, 1, 128, 128, "bfloat16", True, {"block_size": 128}),
    (515, "any", 16, 1, 64, 64, "float16", True, {"block_size": 64}),
    (129, "all", 128, 1, 128, 128, "bfloat16", True, {"block_size": 64}),
    (1031, "all", 16, 4, 128, 128, "bfloat16", False, {"block_size": 64}),
]
ROWS = [("sliding", *shape) for shape in SLIDING] + [("compressed", *shape) for shape in COMPRESSED]
ROWS += [("selected", *shape) for shape in SELECTED]
ROWS = [pytest.param(shape, id=str(shape), marks=() if "float32" in shape else pytest.mark.gpu) for shape in ROWS]


def places_of(kind, B, T):
    """Query indices int32 [B, Tq], None for all."""
    rng = np.random.default_rng(T)
    kinds = {
        "all": lambda: None,
        "slice": lambda: np.tile(np.arange(T // 3, T - 5), (B, 1)),
        "any": lambda: rng.integers(-4, T + 4, (B, T + 11)),
    }
    places = kinds[kind]()
    return None if places is None else jnp.asarray(places, jnp.int32)


def use(monkeypatch, kind, name, *arguments):
    """Has the op run by this backend; skips the test if the backend does not do that."""
    backend = importlib.import_module(f"nsa_jax.gpu.{name}.{kind}")
    if not backend.supports(*arguments):
        pytest.skip(f"not done by {name} here")
    monkeypatch.setattr(backends, kind, lambda *_: backend)
    monkeypatch.setattr(sm90_interval, "FEWEST_SEEN", 0)  # Hopper's forward kernel for short rows too


def prepared(monkeypatch, name, shape):
    """(implementation -> the op, its arrays)."""
    branch, T, queries, G, H, K, V, dtype, packed, options = shape
    B = 2 if packed else 1
    places = places_of(queries, B, T)
    Tq = T if places is None else places.shape[1]
    C = T // options["stride"] if branch == "compressed" else T
    query, key, value = qkv(T, B, T, G * H, H, K, V, C=C, dtype=dtype)
    query = normal(T + 5, B, Tq, G * H, K, dtype=dtype)
    options = {"segment_ids": packing(T) if packed else None, "query_indices": places, "scale": 0.1, **options}
    if branch == "compressed":
        options["key_length"] = T
    if branch == "selected":
        own = np.arange(Tq).reshape(1, Tq, 1, 1) * T // Tq // options["block_size"]
        drawn = np.random.default_rng(T).integers(-1, own + 2, (B, Tq, H, 4))
        options["block_indices"] = jnp.asarray(drawn, jnp.int32)
        use(monkeypatch, "selected", name, query, value, 0.1, options["block_size"], 0)
    else:
        use(monkeypatch, "interval", name, query, value, 0.1)
    op = {
        "sliding": nsa_jax.sliding_window_attention,
        "compressed": nsa_jax.compressed_attention,
        "selected": nsa_jax.selected_attention,
    }[branch]

    def attend(implementation):
        return functools.partial(op, implementation=implementation, return_residual=True, **options)

    return attend, (query, key, value)


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_branch_matches_the_reference(monkeypatch, name, shape):
    attend, arrays = prepared(monkeypatch, name, shape)
    query, _, value = arrays
    cotangents = normal(1, *query.shape[:3], value.shape[3], dtype=query.dtype), normal(2, *query.shape[:3])
    actual = run(attend("triton"), arrays, cotangents=cotangents)
    expected = run(attend("xla"), float32_of(arrays), cotangents=float32_of(cotangents))
    np.testing.assert_array_equal(np.isinf(actual[1]), np.isinf(expected[1]))
    ratio = 1e-5 if query.dtype == jnp.float32 else RATIO
    assert_small_error_ratio(without_infinities(actual), without_infinities(expected), ratio)
    assert_same_bits(run(attend("triton"), arrays, cotangents=cotangents), actual)
    if len(query) > 1:
        for result in (actual[0], *actual[2:]):
            np.testing.assert_array_equal(np.asarray(result[1], np.float32), 0.0)  # a row of padding


@pytest.mark.gpu
@pytest.mark.parametrize("branch", ["sliding", "compressed", "selected"])
@pytest.mark.parametrize("name", BACKENDS)
def test_vmap_equals_a_loop(monkeypatch, name, branch):
    options = {"sliding": {"window_size": 30}, "compressed": {"window": 8, "stride": 4}, "selected": {"block_size": 64}}
    shape = (branch, 90, "any", 16, 1, 64, 64, "bfloat16", False, options[branch])
    attend, (query, *keys) = prepared(monkeypatch, name, shape)
    queries = jnp.stack([query, 2 * query - 1])

    def everything(query):
        return run(attend("triton"), (query, *keys))

    mapped = jax.vmap(everything)(queries)
    for i in range(2):
        assert_same_bits([x[i] for x in mapped], everything(queries[i]))


# T, queries, G, H, K, block_size, window, stride, S, dtype
PICKS = [
    (100, "any", 3, 2, 12, 16, 8, 4, 3, "float32"),
    (257, "all", 16, 2, 128, 16, 16, 16, 3, "bfloat16"),
    (700, "slice", 16, 2, 64, 16, 16, 4, 5, "bfloat16"),
    (1200, "any", 8, 2, 64, 16, 4, 2, 9, "bfloat16"),
]


@pytest.mark.parametrize(
    "shape", [pytest.param(x, id=str(x), marks=() if "float32" in x else pytest.mark.gpu) for x in PICKS]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_picks_match_the_reference(monkeypatch, name, shape):
    T, queries, G, H, K, block_size, window, stride, S, dtype = shape
    places = places_of(queries, 2, T)
    Tq = T if places is None else places.shape[1]
    query, key, value = qkv(T, 2, Tq, G * H, H, K, 4, C=T // stride, dtype=dtype)
    use(monkeypatch, "block_selection", name, query, key, min(S, -(-T // block_size)), block_size // stride)
    common = {"window": window, "stride": stride, "segment_ids": packing(T), "query_indices": places, "key_length": T}
    wide = float32_of((query, key, value))
    _, lse = nsa_jax.compressed_attention(*wide, implementation="xla", return_residual=True, **common)

    def select(implementation, query, key):
        options = {"block_counts": S, "block_size": block_size, "implementation": implementation, **common}
        return np.asarray(jax.jit(functools.partial(nsa_jax.select_blocks, **options))(query, key, lse))

    actual, expected = select("triton", query, key), select("xla", *wide[:2])
    # sums in another order: of two blocks that are all but equally important the other one may be the last
    np.testing.assert_array_equal((actual >= 0).sum(-1), (expected >= 0).sum(-1))
    assert (actual == expected).all(-1).mean() >= (1 if dtype == "float32" else 0.99)
    assert_same_bits([select("triton", query, key)], [actual])
