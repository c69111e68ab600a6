"""Slicing never shows: a row's queries dealt out in hands, of any places and order, give what the whole row gives.

The gradients of keys and values add up over the hands. Expected is what "xla" gives for the whole row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_small_error_ratio, branch_gates, normal, qkv, row, without_infinities

import nsa_jax

T, B = 120, 2
# row 0: padding, a long segment, a short one, one that begins far behind where a hand ends; row 1: one segment
SEGMENT_IDS = np.stack([row(T, (-1, 2), (3, 30), (4, 1), (3, 82), (-1, 5)), row(T, (0, T))])
SHARED = ("key", "value", "compressed_key", "compressed_value")
RATIO = 1e-5  # root-mean-square error of float32, relative


def slices(rng):
    """Hands of neighbours, the first one in the middle of a segment far into the row, the second one beyond its end."""
    return np.stack([np.tile(np.arange(first, first + 24), (B, 1)) for first in (80, 104)])


def shuffled(rng):
    """Hands in any order, with repeats and queries outside of the row."""
    hands = rng.integers(0, T, (2, B, 24))
    return np.where(rng.random(hands.shape) < 0.1, rng.choice([-1, -(2**31), T, 2**31 - 1], hands.shape), hands)


def single(rng):
    """One query each."""
    return np.asarray([[[90], [T - 1]], [[9], [-1]]])


def many(rng):
    """More queries than there are tokens."""
    return rng.integers(-2, T + 2, (1, B, T + 11))


def of_branch(op, names):
    """(attend, its float arrays' names) of an op that returns (output, lse)."""

    def attend(implementation, floats, integers, query_indices, **options):
        arrays = [floats[name] for name in names]
        if "block_indices" in integers:
            arrays.append(integers["block_indices"])
            options["block_counts"] = integers.get("block_counts")
        return op(*arrays, query_indices=query_indices, implementation=implementation, return_residual=True, **options)

    return attend


def whole_op(implementation, floats, integers, query_indices, **options):
    return (
        nsa_jax.native_sparse_attention(
            **floats, **integers, query_indices=query_indices, implementation=implementation, **options
        ),
    )


SLIDING = of_branch(nsa_jax.sliding_window_attention, ("query", "key", "value"))
COMPRESSED = of_branch(nsa_jax.compressed_attention, ("query", "compressed_key", "compressed_value"))
SELECTED = of_branch(nsa_jax.selected_attention, ("query", "key", "value"))
BLOCKS = {"block_size": 16, "num_init_blocks": 0, "num_local_blocks": 1}
NATIVE = BLOCKS | {"block_counts": 3, "compression_window": 8, "compression_stride": 4}

# deal, attend, G, H, K, V, stride of the compressed keys, integer arrays, gates, packed, options
CASES = {
    "sliding, slices": (slices, SLIDING, 3, 1, 16, 8, 0, (), (), True, {"window_size": 9}),
    "sliding, many": (many, SLIDING, 1, 1, 8, 12, 0, (), (), True, {"window_size": 40}),
    "sliding, one": (single, SLIDING, 16, 2, 16, 16, 0, (), (), False, {"window_size": 10**400}),
    "compressed, slices": (slices, COMPRESSED, 16, 1, 12, 20, 4, (), (), True, {"window": 8, "stride": 4}),
    "compressed, shuffled": (shuffled, COMPRESSED, 3, 2, 16, 8, 4, (), (), True, {"window": 4, "stride": 4}),
    "compressed, one": (single, COMPRESSED, 1, 1, 16, 8, 16, (), (), False, {"window": 16, "stride": 16}),
    "selected, slices": (slices, SELECTED, 3, 1, 16, 8, 0, ("block_indices",), (), True, {"block_size": 16}),
    "selected, shuffled": (
        shuffled, SELECTED, 16, 1, 8, 12, 0, ("block_indices", "block_counts"), (), True, {"block_size": 16},
    ),
    "selected, many": (many, SELECTED, 1, 1, 8, 8, 0, ("block_indices",), (), False, {"block_size": 32}),
    "selected, one": (single, SELECTED, 1, 2, 16, 16, 0, ("block_indices",), (), True, {"block_size": 16}),
    "whole, slices, window shorter than a block": (
        slices, whole_op, 3, 1, 16, 8, 0, (), ("compressed", "selected", "sliding"), True, NATIVE | {"window_size": 9},
    ),
    "whole, shuffled, window longer than a block": (
        shuffled, whole_op, 1, 2, 8, 16, 0, (), ("compressed", "selected", "sliding"), True,
        NATIVE | {"window_size": 40},
    ),
    "whole, many, given blocks and compressed keys": (
        many, whole_op, 2, 1, 16, 8, 4, ("block_indices",), ("compressed", "selected"), True, NATIVE,
    ),
    "whole, one": (single, whole_op, 16, 1, 8, 8, 0, (), ("selected", "sliding"), False, NATIVE | {"window_size": 20}),
}  # fmt: skip


def drawn(G, H, K, V, stride, names, gates):
    """(float arrays by name, integer arrays by name) of the whole row."""
    floats = dict(zip(("query", "key", "value"), qkv(G, B, T, G * H, H, K, V), strict=True))
    if stride:
        _, floats["compressed_key"], floats["compressed_value"] = qkv(G + 3, B, 1, 1, H, K, V, C=T // stride)
    floats |= {f"{name}_gate": branch_gates(G, B, T, G * H)[f"{name}_gate"] for name in gates}
    rng = np.random.default_rng(G)
    integers = {"block_indices": rng.integers(-1, 7, (B, T, H, 3)), "block_counts": rng.integers(-1, 4, (B, T, H))}
    return floats, {name: jnp.asarray(integers[name], jnp.int32) for name in names}


@functools.partial(jax.jit, static_argnums=0)
def everything(attend, floats, integers, cotangents, query_indices):
    """(results, gradients by name)."""
    results, pullback = jax.vjp(lambda floats: attend(floats, integers, query_indices), floats)
    return results, pullback(cotangents)[0]


def at(x, places):
    """x [B, T, ...] at places [B, Tq], something else outside of the row."""
    taken = np.asarray(x)[np.arange(B)[:, None], np.clip(places, 0, T - 1)]
    outside = (places < 0) | (places >= T)
    return np.where(outside.reshape(*outside.shape, *(1,) * (x.ndim - 2)), 1, taken).astype(x.dtype)


def added(parts, places):
    """[B, T, ...]: parts [B, Tq, ...] of hands added up where they stand."""
    total = np.zeros((B, T, *parts[0].shape[2:]))
    for part, hand in zip(parts, places, strict=True):
        for b, i in np.ndindex(hand.shape):
            if 0 <= hand[b, i] < T:
                total[b, hand[b, i]] += np.asarray(part, np.float64)[b, i]
    return total


class Problem:
    """A case: what is dealt out, and what the whole row gives for the cotangents of what is dealt, added up."""

    def __init__(self, name):
        deal, attend, *sizes, integers, gates, packed, options = CASES[name]
        self.hands = deal(np.random.default_rng(5))
        floats, self.integers = drawn(*sizes, integers, gates)
        if attend is COMPRESSED:  # takes no key row
            del floats["key"], floats["value"]
            options = options if packed else options | {"key_length": T}
        self.attend = functools.partial(attend, segment_ids=SEGMENT_IDS if packed else None, **options)
        self.own = {name: x for name, x in floats.items() if name not in SHARED}
        self.shared = {name: x for name, x in floats.items() if name in SHARED}
        self.hidden = (self.hands < 0) | (self.hands >= T)
        if packed:
            self.hidden |= np.asarray([at(SEGMENT_IDS, places) < 0 for places in self.hands])

        results = jax.eval_shape(lambda: self.attend("xla", floats, self.integers, None))
        count, _, Tq = self.hands.shape
        self.cotangents = [normal(7 + i, count, B, Tq, *x.shape[2:]) for i, x in enumerate(results)]
        of_row = tuple(jnp.asarray(added(list(x), self.hands), jnp.float32) for x in self.cotangents)
        self.whole = everything(functools.partial(self.attend, "xla"), floats, self.integers, of_row, None)


problem_of = functools.cache(Problem)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_hands_give_what_the_whole_row_gives(name, implementation):
    problem = problem_of(name)
    attend = functools.partial(problem.attend, implementation)
    (expected, expected_gradients), gradients = problem.whole, {}
    for number, places in enumerate(problem.hands):
        own, integers = (
            {name: at(x, places) for name, x in arrays.items()} for arrays in (problem.own, problem.integers)
        )
        cotangents = tuple(x[number] for x in problem.cotangents)
        results, parts = everything(attend, own | problem.shared, integers, cotangents, jnp.asarray(places, jnp.int32))
        shown = ~problem.hidden[number]
        for result, whole, nothing in zip(results, expected, (0.0, -np.inf), strict=False):
            actual, wanted = np.asarray(result), at(whole, places)
            np.testing.assert_array_equal(actual[~shown], nothing)
            np.testing.assert_array_equal(np.isinf(actual[shown]), np.isinf(wanted[shown]))
            assert_small_error_ratio(*(without_infinities([x[shown]]) for x in (actual, wanted)), RATIO)
        for name, part in parts.items():
            gradients.setdefault(name, []).append(np.asarray(part, np.float64))
            if name in own:
                np.testing.assert_array_equal(gradients[name][-1][~shown], 0.0)
    for name, parts in gradients.items():
        total = np.sum(parts, axis=0) if name in problem.shared else added(parts, problem.hands)
        assert_small_error_ratio([total], [expected_gradients[name]], RATIO)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("deal", "packed"), [(slices, True), (shuffled, True), (many, False), (single, False)])
def test_picks_of_hands_are_those_of_the_whole_row(deal, packed, implementation):
    G, H, S, windows = 3, 1, 3, {"window": 8, "stride": 4}
    query, key, value = qkv(2, B, T, G * H, H, 16, 4, C=T // 4)
    segment_ids = SEGMENT_IDS if packed else None
    _, lse = nsa_jax.compressed_attention(
        query, key, value, segment_ids=segment_ids, return_residual=True, implementation="xla", **windows
    )
    counts = np.random.default_rng(1).integers(-1, S + 2, (B, T, H)).astype(np.int32)
    options = {"segment_ids": segment_ids, "key_length": T, "max_block_count": S, **windows, **BLOCKS}

    @functools.partial(jax.jit, static_argnums=0)
    def select(implementation, query, lse, counts, query_indices):
        return nsa_jax.select_blocks(
            query, key, lse, block_counts=counts, query_indices=query_indices, implementation=implementation, **options
        )

    whole = select("xla", query, lse, counts, None)
    assert (np.asarray(whole) > 3).any()
    for places in deal(np.random.default_rng(6)):
        picks = select(
            implementation, at(query, places), at(lse, places), at(counts, places), jnp.asarray(places, jnp.int32)
        )
        hidden = (places < 0) | (places >= T)
        if packed:
            hidden |= at(SEGMENT_IDS, places) < 0
        expected = np.where(hidden[..., None, None], -1, at(whole, places))
        np.testing.assert_array_equal(picks, expected)


def test_chunks_of_the_reference_do_not_show(monkeypatch):
    from nsa_jax import reference

    floats, _ = drawn(2, 1, 8, 8, 0, (), ("compressed", "selected", "sliding"))
    places = shuffled(np.random.default_rng(5))[0]
    arrays = {name: x if name in SHARED else at(x, places) for name, x in floats.items()}
    cotangent = (normal(3, B, 24, 2, 8),)
    results = []
    for chunk in (reference.QUERY_CHUNK, 16):
        monkeypatch.setattr(reference, "QUERY_CHUNK", chunk)
        attend = functools.partial(whole_op, "xla", segment_ids=SEGMENT_IDS, window_size=9, **NATIVE)
        results.append(jax.tree.leaves(everything(attend, arrays, {}, cotangent, jnp.asarray(places, jnp.int32))))
    assert_small_error_ratio(*results, RATIO)


def test_the_row_is_no_constant_of_the_program():
    """Segment ids and query indices may change at every call."""
    floats, _ = drawn(1, 1, 8, 8, 0, (), ("selected", "sliding"))
    traces = []

    @jax.jit
    def attend(query_indices, segment_ids):
        traces.append(None)
        own = {name: x if name in SHARED else x[:, :4] for name, x in floats.items()}
        return whole_op("xla", own, {}, query_indices, segment_ids=segment_ids, window_size=9, **NATIVE)[0]

    first = attend(jnp.full((B, 4), 77, jnp.int32), jnp.asarray(SEGMENT_IDS))
    second = attend(jnp.full((B, 4), 100, jnp.int32), jnp.zeros((B, T), jnp.int32))
    assert len(traces) == 1 and not np.array_equal(first, second)


def calls(**changes):
    """Both ops that are not given the key row, with these arguments."""
    query, key, value = qkv(0, 1, 5, 2, 1, 8, 8, C=4)
    options = {
        "window": 4,
        "stride": 4,
        "query_indices": jnp.zeros((1, 5), jnp.int32),
        "implementation": "xla",
    } | changes
    yield lambda: nsa_jax.compressed_attention(query, key, value, **options)
    yield lambda: nsa_jax.select_blocks(query, key, jnp.zeros((1, 5, 2)), block_size=16, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ValueError, "key_length: expected the tokens of the key row, as query_indices are given, got None"),
        ({"key_length": 0}, ValueError, "key_length: expected at least 1, got 0"),
        ({"key_length": 16.0}, TypeError, r"key_length: expected an int, got 16.0 \(float\)"),
        ({"key_length": True}, TypeError, r"key_length: expected an int, got True \(bool\)"),
        ({"key_length": 20}, ValueError, r"compressed_key: expected shape \[1, 5, H, 8\], got \[1, 4, 1, 8\]"),
        (
            {"key_length": 16, "segment_ids": jnp.zeros((1, 17), jnp.int32)},
            ValueError,
            "key_length: expected 17, as many as segment_ids, got 16",
        ),
        (
            {"key_length": 16, "query_indices": None},
            ValueError,
            "key_length: expected 5, as many as queries, .* got 16",
        ),
        (
            {"segment_ids": jnp.zeros((2, 16), jnp.int32)},
            ValueError,
            r"segment_ids: expected shape \[1, T\], got \[2, 16\]",
        ),
        (
            {"key_length": 16, "query_indices": jnp.zeros((1, 4), jnp.int32)},
            ValueError,
            r"query_indices: expected shape \[1, 5\], got \[1, 4\]",
        ),
        (
            {"key_length": 16, "query_indices": jnp.zeros((1, 5))},
            TypeError,
            "query_indices: expected an integer dtype, got float32",
        ),
    ],
)
def test_bad_key_length(changes, error, message):
    for call in calls(**changes):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "changes", [{"key_length": 16}, {"key_length": np.int64(19)}, {"segment_ids": np.zeros((1, 17), int)}]
)
def test_key_length_is_told_by_either(changes):
    for call in calls(**changes):
        assert call().shape[:2] == (1, 5)
