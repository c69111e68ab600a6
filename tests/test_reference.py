import functools

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import reference
from nsa_jax.compression import compress
from nsa_jax.rows.queries import locate

# float32 sums of at most 200 terms of order 1: 200 * 2^-24 = 1.2e-5
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

SHAPES = {
    "one token": {"T": 1, "N": 2, "H": 2, "K": 8, "V": 4, "block_size": 16, "window": 16, "stride": 16},
    "odd length": {"T": 17, "N": 2, "H": 1, "K": 4, "V": 8, "block_size": 16, "window": 4, "stride": 2},
    "groups of three": {"T": 63, "N": 6, "H": 2, "K": 8, "V": 12, "block_size": 16, "window": 8, "stride": 4},
    "groups of sixteen": {"T": 33, "N": 16, "H": 1, "K": 12, "V": 4, "block_size": 8, "window": 8, "stride": 8},
    "the paper's windows": {"T": 200, "N": 2, "H": 1, "K": 8, "V": 8, "block_size": 64, "window": 32, "stride": 16},
}
PACKINGS = ("none", "packed", "padded")
# (window_size, blocks selected, num_init_blocks, num_local_blocks, entries of a user's list that count)
OPTIONS = {
    "one token": (1, 3, 1, 2, None),
    "odd length": (12, 2, 10**10, 0, 2),
    "groups of three": (9, 3, 1, 2, None),
    "groups of sixteen": (10_000, 0, 1, 2, 0),
    "the paper's windows": (1, 3, 0, 1, 4),
}

# of queries: a slice far into the row, any order, more than tokens, repeats and places outside of the row, only one
QUERIES = {
    "slice": lambda T, rng: np.arange(T // 2, T - T // 8) + np.zeros((2, 1)),
    "shuffled": lambda T, rng: np.stack([rng.permutation(T), rng.permutation(T)]),
    "many": lambda T, rng: rng.integers(-3, T + 3, (2, T + 7)),
    "one": lambda T, rng: np.array([[T - 9], [-1]]),
}
# shape, segments, queries
CASES = [(shape, kind, None) for shape in SHAPES for kind in PACKINGS] + [
    ("groups of three", "padded", "slice"),
    ("the paper's windows", "none", "slice"),
    ("groups of three", "packed", "shuffled"),
    ("groups of sixteen", "padded", "many"),
    ("one token", "none", "many"),
    ("odd length", "packed", "one"),
]

SIZES = (
    *("window_size", "window", "stride", "scale", "block_size", "length"),
    *("max_block_count", "num_init_blocks", "num_local_blocks"),
)


def run(op, *arrays, **options):
    """An op of the reference, compiled, with `segment_ids` and `query_indices` in place of the row."""
    return _compiled(op, isinstance(options.get("block_counts"), int | None))(*arrays, **options)


@functools.cache
def _compiled(op, static_counts):
    names = (*SIZES, "block_counts") if static_counts else SIZES
    return jax.jit(functools.partial(in_row, op), static_argnames=names)


def in_row(op, query, key, value, *arrays, segment_ids, query_indices=None, length=None, **options):
    """`length` is that of the key row, unless that is as long as the queries are many."""
    segment_ids, query_indices = (None if x is None else jnp.asarray(x) for x in (segment_ids, query_indices))
    row = locate(segment_ids, query_indices, query.shape[0], query.shape[1] if length is None else length)
    return op(query, key, value, row, *arrays, **options)


def packing(kind, length, seed=0):
    """Segment ids [2, length]: runs of 1 to 40 tokens; "padded" adds padding at both ends, inside, and a whole row."""
    if kind == "none":
        return None
    rng = np.random.default_rng(seed)
    ids = np.empty((2, length), np.int32)
    for row in ids:
        runs = np.concatenate([[min(3, length), 1, 1], rng.integers(1, 41, length)])
        row[:] = np.repeat(rng.permutation(len(runs)), runs)[:length]
    if kind == "padded":
        ids[0, : length // 6] = ids[0, length // 2 : length // 2 + 3] = ids[0, length - length // 8 - 1 :] = -1
        ids[1] = -7
    return ids


def draw(T, N, H, K, V, block_size, window, stride, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "query": normal(2, T, N, K),
        "key": normal(2, T, H, K),
        "value": normal(2, T, H, V),
        "compressed_key": normal(2, T // stride, H, K),
        "compressed_value": normal(2, T // stride, H, V),
    }


def pick(arrays, *names):
    return tuple(arrays[name] for name in names)


def assert_same_attention(got, expected):
    (output, lse), (expected_output, expected_lse) = got, expected
    np.testing.assert_allclose(output, expected_output, **CLOSE)
    np.testing.assert_allclose(lse, expected_lse, **CLOSE)


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(filter(None, case)))
def case(request):
    """(sizes, options, arrays, {segment_ids, query_indices})."""
    shape, kind, queries = request.param
    arrays, T = draw(**SHAPES[shape]), SHAPES[shape]["T"]
    places = {"segment_ids": packing(kind, T), "query_indices": None}
    if queries:
        rng = np.random.default_rng(T)
        places["query_indices"] = QUERIES[queries](T, rng).astype(np.int32)
        heads_and_width = arrays["query"].shape[2:]
        arrays["query"] = rng.standard_normal((*places["query_indices"].shape, *heads_and_width)).astype(np.float32)
    return SHAPES[shape], OPTIONS[shape], arrays, places


def test_sliding_window_attention(case):
    sizes, (window_size, *_), arrays, places = case
    arguments = pick(arrays, "query", "key", "value")
    options = {"window_size": window_size, "scale": 0.4, **places}
    got = run(reference.sliding_window_attention, *arguments, length=sizes["T"], **options)
    assert_same_attention(got, brute_force.sliding_window_attention(*arguments, **options))


def test_compressed_attention(case):
    sizes, _, arrays, places = case
    arguments = pick(arrays, "query", "compressed_key", "compressed_value")
    options = {"window": sizes["window"], "stride": sizes["stride"], "scale": 0.4, "length": sizes["T"], **places}
    got = run(reference.compressed_attention, *arguments, **options)
    assert_same_attention(got, brute_force.compressed_attention(*arguments, **options))


def check_selection(case, max_block_count, num_init_blocks, num_local_blocks, per_token):
    sizes, _, arrays, places = case
    query, key, value = pick(arrays, "query", "compressed_key", "compressed_value")
    windows = {"window": sizes["window"], "stride": sizes["stride"], "scale": 0.4, "length": sizes["T"], **places}
    _, lse = run(reference.compressed_attention, query, key, value, **windows)
    counts = max_block_count
    if per_token:
        shape = (2, query.shape[1], sizes["H"])
        counts = np.random.default_rng(1).integers(-1, max_block_count + 3, shape).astype(np.int32)
    options = windows | {
        "block_counts": counts,
        "max_block_count": max_block_count,
        "block_size": sizes["block_size"],
        "num_init_blocks": num_init_blocks,
        "num_local_blocks": num_local_blocks,
    }
    got = run(reference.select_blocks, query, key, lse, **options)
    assert got.dtype == jnp.int32
    # brute force lists the forced blocks one by one; no row here has a hundred
    clipped = {name: min(options[name], 100) for name in ("num_init_blocks", "num_local_blocks")}
    np.testing.assert_array_equal(got, brute_force.select_blocks(query, key, **(options | clipped)))


@pytest.mark.parametrize("per_token", [False, True], ids=["int count", "counts"])
def test_select_blocks(case, per_token):
    _, (_, max_block_count, num_init_blocks, num_local_blocks, _), *_ = case
    check_selection(case, max_block_count, num_init_blocks, num_local_blocks, per_token)


@pytest.mark.parametrize(
    ("max_block_count", "num_init_blocks", "num_local_blocks"), [(2, 2, 2), (30, 1, 2), (3, 1, 10**10)]
)
def test_forced_blocks_and_room(max_block_count, num_init_blocks, num_local_blocks):
    shape = "groups of three"
    case = SHAPES[shape], None, draw(**SHAPES[shape]), {"segment_ids": None}
    check_selection(case, max_block_count, num_init_blocks, num_local_blocks, per_token=False)


def test_equal_importance_goes_to_the_smaller_block():
    query, key = jnp.zeros((1, 160, 2, 4)), jnp.ones((1, 10, 1, 4))
    windows = {"window": 16, "stride": 16, "scale": 1.0, "segment_ids": None}
    _, lse = run(reference.compressed_attention, query, key, key, **windows)
    options = {"block_counts": 6, "max_block_count": 6, "block_size": 16, "num_init_blocks": 1, "num_local_blocks": 2}
    chosen = run(reference.select_blocks, query, key, lse, **options, **windows)
    assert chosen[0, 159, 0].tolist() == [0, 1, 2, 3, 8, 9]
    assert chosen[0, 40, 0].tolist() == [0, 1, 2, -1, -1, -1]


def listed_blocks(sizes, queries=None, seed=2):
    """Indices [2, queries, H, 5] unsorted and repeated, from below 0 to far beyond the last block."""
    rng = np.random.default_rng(seed)
    shape = (2, queries or sizes["T"], sizes["H"], 5)
    blocks = rng.integers(-2, -(-sizes["T"] // sizes["block_size"]) + 2, shape)
    return np.where(rng.random(blocks.shape) < 0.05, 2**31 - 1, blocks).astype(np.int32)


@pytest.mark.parametrize("per_token", [False, True], ids=["one count", "counts"])
def test_selected_attention(case, per_token):
    sizes, (*_, block_counts), arrays, places = case
    indices = listed_blocks(sizes, arrays["query"].shape[1])
    if per_token:
        block_counts = np.random.default_rng(3).integers(-1, 8, indices.shape[:3]).astype(np.int32)
    arguments = (*pick(arrays, "query", "key", "value"), indices)
    options = {"block_counts": block_counts, "block_size": sizes["block_size"], "scale": 0.4, **places}
    got = run(reference.selected_attention, *arguments, length=sizes["T"], **options)
    assert_same_attention(got, brute_force.selected_attention(*arguments, **options))


def test_selected_attention_without_a_list():
    arrays = draw(**SHAPES["odd length"])
    options = {"block_counts": None, "block_size": 16, "scale": 0.4, "segment_ids": None}
    indices = np.zeros((2, 17, 1, 0), np.int32)
    output, lse = run(reference.selected_attention, *pick(arrays, "query", "key", "value"), indices, **options)
    assert not output.any()
    assert (lse == -np.inf).all()


GRADIENT_SHAPE = SHAPES["groups of three"] | {"T": 41}


def operations(segment_ids, exact=False):
    """Each attention op of the reference (or, exact, of brute force) as a function of its differentiable arrays."""
    sizes = GRADIENT_SHAPE

    def of(name):
        return getattr(brute_force, name) if exact else functools.partial(in_row, getattr(reference, name))

    common = {"scale": 0.4, "segment_ids": segment_ids}
    windows = {"window": sizes["window"], "stride": sizes["stride"]}
    blocks = {"block_counts": None, "block_size": sizes["block_size"]}

    def selected(query, key, value):
        return of("selected_attention")(query, key, value, listed_blocks(sizes), **blocks, **common)

    return {
        "sliding": (functools.partial(of("sliding_window_attention"), window_size=9, **common), ("key", "value")),
        "compressed": (
            functools.partial(of("compressed_attention"), **windows, **common),
            ("compressed_key", "compressed_value"),
        ),
        "selected": (selected, ("key", "value")),
    }


def weighted(outputs, weights):
    """A scalar of output and lse; -inf, where a query sees nothing, is left out."""
    (output, lse), (output_weights, lse_weights) = outputs, weights
    numpy = np if isinstance(output, np.ndarray) else jnp
    return (output * output_weights).sum() + (numpy.where(numpy.isfinite(lse), lse, 0.0) * lse_weights).sum()


def weights_of(sizes):
    rng = np.random.default_rng(4)
    shape = (2, sizes["T"], sizes["N"])
    return rng.standard_normal((*shape, sizes["V"])).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["sliding", "compressed", "selected"])
@pytest.mark.parametrize("kind", ["none", "padded"])
def test_gradients_against_finite_differences(name, kind):
    ids = packing(kind, GRADIENT_SHAPE["T"])
    weights = weights_of(GRADIENT_SHAPE)
    op, names = operations(ids)[name]
    exact, _ = operations(ids, exact=True)[name]
    arguments = pick(draw(**GRADIENT_SHAPE), "query", *names)
    gradients = jax.jit(jax.grad(lambda *x: weighted(op(*x), weights), (0, 1, 2)))(*arguments)

    rng = np.random.default_rng(5)
    arguments = [x.astype(np.float64) for x in arguments]
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        step = [direction * 1e-5 if j == i else np.zeros_like(x) for j, x in enumerate(arguments)]
        above, below = (
            weighted(exact(*(x + sign * dx for x, dx in zip(arguments, step, strict=True))), weights)
            for sign in (1, -1)
        )
        # float32 rounding of the thousands of terms of order 1 that make up the product
        np.testing.assert_allclose((gradient * direction).sum(), (above - below) / 2e-5, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["sliding", "compressed", "selected"])
def test_nothing_in_padding_reaches_a_token(name):
    ids = packing("padded", GRADIENT_SHAPE["T"])
    op, names = operations(ids)[name]
    weights = weights_of(GRADIENT_SHAPE)
    arrays = draw(**GRADIENT_SHAPE)
    poisoned = {key: x.copy() for key, x in arrays.items()}
    for key in ("query", "key", "value"):
        poisoned[key][ids < 0] = np.nan
    for b in range(2):
        spans = brute_force.window_spans(brute_force.segment_bounds(ids, b, ids.shape[1]), 8, 4)
        for key in ("compressed_key", "compressed_value"):
            poisoned[key][b, sum(map(len, spans)) :] = np.nan
    assert all(np.isnan(poisoned[key]).any() for key in ("query", *names))

    @jax.jit
    def outputs_and_gradients(*x):
        outputs = op(*x)
        return outputs, jax.grad(lambda *x: weighted(op(*x), weights), (0, 1, 2))(*x)

    clean = outputs_and_gradients(*pick(arrays, "query", *names))
    (output, lse), gradients = outputs_and_gradients(*pick(poisoned, "query", *names))
    jax.tree.map(np.testing.assert_array_equal, clean, ((output, lse), gradients))
    assert not output[ids < 0].any()
    assert (lse[ids < 0] == -np.inf).all()
    assert not gradients[0][ids < 0].any()
    assert not gradients[1][1].any()


def test_padding_does_not_change_a_selection():
    ids = packing("padded", 63)
    sizes = SHAPES["groups of three"]
    query, key, value = pick(draw(**sizes), "query", "compressed_key", "compressed_value")
    windows = {"window": 8, "stride": 4, "scale": 0.4, "segment_ids": ids}
    options = {"block_counts": 3, "max_block_count": 3, "block_size": 16, "num_init_blocks": 0, "num_local_blocks": 1}
    _, lse = run(reference.compressed_attention, query, key, value, **windows)
    clean = run(reference.select_blocks, query, key, lse, **options, **windows)
    query[ids < 0] = np.nan
    np.testing.assert_array_equal(clean, run(reference.select_blocks, query, key, lse, **options, **windows))


def sparse_attention(query, key, value, segment_ids):
    """The three branches added up, and the selection, with l = 8, d = 4, blocks of 16."""
    windows = {"window": 8, "stride": 4}
    compressed_key, compressed_value = (compress(x, segment_ids=segment_ids, **windows) for x in (key, value))
    row = locate(None if segment_ids is None else jnp.asarray(segment_ids), None, *key.shape[:2])
    options = {"block_counts": 2, "max_block_count": 2, "block_size": 16, "num_init_blocks": 0, "num_local_blocks": 1}
    windows["scale"] = 0.4
    compressed, lse = reference.compressed_attention(query, compressed_key, compressed_value, row, **windows)
    indices = reference.select_blocks(query, compressed_key, lse, row, **options, **windows)
    arrays = query, key, value, row
    selected, _ = reference.selected_attention(*arrays, indices, block_counts=None, block_size=16, scale=0.4)
    sliding, _ = reference.sliding_window_attention(*arrays, window_size=9, scale=0.4)
    return compressed + selected + sliding, indices


@jax.jit
def sparse_attention_with_gradients(query, key, value, weights, segment_ids):
    def loss(*arrays):
        output, indices = sparse_attention(*arrays, segment_ids)
        return (output * weights).sum(), (output, indices)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)


def test_whole_attention_against_brute_force():
    sizes = SHAPES["groups of three"]
    arguments = pick(draw(**sizes), "query", "key", "value")
    ids = packing("padded", 63)
    one = np.ones((2, 63, 6))
    expected = brute_force.native_sparse_attention(
        *arguments, one, one, one, block_counts=2, block_size=16, window_size=9, window=8, stride=4,
        num_init_blocks=0, num_local_blocks=1, scale=0.4, segment_ids=ids,
    )  # fmt: skip
    _, (output, _) = sparse_attention_with_gradients(*arguments, weights_of(sizes)[0], ids)
    np.testing.assert_allclose(output, expected, **CLOSE)


def test_a_packed_segment_is_as_alone():
    sizes = SHAPES["groups of three"]
    arguments = (*pick(draw(**sizes), "query", "key", "value"), weights_of(sizes)[0])
    runs = {3: 29, -1: 3, 8: 1, 5: 29, 0: 1}
    ids = np.repeat(np.array(list(runs), np.int32), list(runs.values()))[None].repeat(2, 0)
    packed = sparse_attention_with_gradients(*arguments, ids)
    for number in (3, 5):
        inside = ids[0] == number
        alone = sparse_attention_with_gradients(*(x[:, inside] for x in arguments), None)
        # the same sums, in an order that may depend on the row's length
        close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
        jax.tree.map(lambda x, y, inside=inside, close=close: close(x[:, inside], y), packed, alone)


def test_a_segment_does_not_see_a_change_in_another():
    sizes = SHAPES["groups of three"]
    arguments = (*pick(draw(**sizes), "query", "key", "value"), weights_of(sizes)[0])
    changed = [x.copy() for x in arguments]
    ids = np.repeat(np.array([0, 1, 2], np.int32), [20, 13, 30])[None].repeat(2, 0)
    for x in changed:
        x[:, 20:33] += 3
    before = sparse_attention_with_gradients(*arguments, ids)
    after = sparse_attention_with_gradients(*changed, ids)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[ids != 1], y[ids != 1]), before, after)
    assert not np.array_equal(before[1][0], after[1][0])


def test_chunks_do_not_show(monkeypatch):
    sizes = SHAPES["groups of three"]
    arguments = (*pick(draw(**sizes), "query", "key", "value"), weights_of(sizes)[0], packing("padded", 63))
    whole = sparse_attention_with_gradients(*arguments)
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)
    uncached = sparse_attention_with_gradients.__wrapped__
    chunked = jax.jit(lambda *x: uncached(*x))(*arguments)
    # a key's gradient is summed chunk by chunk
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), whole, chunked)


def test_memory_grows_with_the_row_not_its_square():
    def loss(query, key, value, indices):
        options = {"block_counts": None, "block_size": 64, "scale": 0.25, "segment_ids": None}
        return in_row(reference.selected_attention, query, key, value, indices, **options)[0].sum()

    shapes = [(1, 8192, 2, 16), (1, 8192, 1, 16), (1, 8192, 1, 16)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    indices = jax.ShapeDtypeStruct((1, 8192, 1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, indices).compile().memory_analysis()
    # one array of the scores alone, [2, 8192, 8192], is 512 MiB
    assert memory.temp_size_in_bytes < 256 * 2**20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_float32_inside(dtype):
    arrays = pick(draw(**SHAPES["groups of three"]), "query", "key", "value")
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    options = {"window_size": 12, "scale": 0.4, "segment_ids": None}
    output, lse = run(reference.sliding_window_attention, *arrays, **options)
    exact, exact_lse = run(reference.sliding_window_attention, *(x.astype(jnp.float32) for x in arrays), **options)
    assert output.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(output, exact.astype(dtype))
    np.testing.assert_array_equal(lse, exact_lse)


def test_products_are_exact_unless_the_user_says_otherwise():
    arrays = pick(draw(**SHAPES["odd length"]), "query", "key", "value")
    options = {"window_size": 12, "scale": 0.4, "segment_ids": None}

    def traced():
        return str(jax.make_jaxpr(functools.partial(in_row, reference.sliding_window_attention, **options))(*arrays))

    assert traced().count("HIGHEST") >= 2
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in traced()
