"""What is not seen does not count: NaN and infinity reach nobody who does not see them, bit for bit, and all who do.

A victim is the beginning of one segment. All that its queries may not see is poisoned at once: other segments' queries,
keys, values, gates and cotangents, their own segment's future, padding, slots that hold no window, queries outside of
the row. What the victim gets and gives must be the bits of a run on clean arrays, in which the cotangents of what is
poisoned are 0: a query that is poisoned, or sees what is, gets NaN itself and gives nothing to keys and values.
"""

import functools
from typing import NamedTuple

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import branch_gates, normal, qkv, row

import nsa_jax

# numpy, in Triton's interpreter, warns of sums and maxima of NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

B = 2
PER_QUERY = ("query", "lse", "compressed_gate", "selected_gate", "sliding_gate")
PER_SLOT = ("compressed_key", "compressed_value")


class Sizes(NamedTuple):
    T: int
    G: int
    H: int
    K: int
    V: int
    block_size: int
    window: int
    stride: int
    dtype: str


SMALL = Sizes(T=60, G=3, H=2, K=16, V=8, block_size=16, window=8, stride=4, dtype="float32")
LARGE = [  # which the kernels for Hopper take
    Sizes(T=300, G=16, H=2, K=128, V=128, block_size=64, window=32, stride=16, dtype="bfloat16"),
    Sizes(T=515, G=16, H=1, K=64, V=64, block_size=64, window=64, stride=64, dtype="bfloat16"),
]
SIZES = [pytest.param(SMALL, id="small")] + [
    pytest.param(sizes, id=f"{sizes.T}-{sizes.K}", marks=pytest.mark.gpu) for sizes in LARGE
]


def segment_ids_of(T):
    """Two rows: padding at the ends and in the middle, equal ids apart, a segment that holds most of a row."""
    return np.stack(
        [row(T, (-1, 3), (0, T // 3), (4, 1), (0, T // 3 + 5), (-7, 2), (2, T)), row(T, (-5, 4), (2, T - 9), (-1, 5))]
    )


def places_of(kind, T):
    """Query indices [B, Tq], None for a query at every token."""
    if kind == "all":
        return None
    rng = np.random.default_rng(1)
    places = rng.integers(0, T, (B, T - 20))
    return np.where(rng.random(places.shape) < 0.1, rng.choice([-1, T, 2**31 - 1], places.shape), places)


def slots_of(segment_ids, sizes):
    """(start of the segment, last token) of the window in each slot [B, C]; -1 where there is none."""
    starts, lasts = np.full((2, B, sizes.T // sizes.stride), -1)
    for b in range(B):
        bounds = brute_force.segment_bounds(segment_ids, b, sizes.T)
        spans = brute_force.window_spans(bounds, sizes.window, sizes.stride)
        for slot, (start, (_, stop)) in enumerate(
            (start, span) for (start, _), windows in zip(bounds, spans, strict=True) for span in windows
        ):
            starts[b, slot], lasts[b, slot] = start, stop - 1
    return starts, lasts


class Setting:
    """Clean arrays by name, and where everything stands."""

    def __init__(self, sizes, names, queries):
        T, G, H, K, V, *_ = sizes
        self.sizes = sizes
        self.segment_ids, places = segment_ids_of(T), places_of(queries, T)
        self.query_indices = None if places is None else jnp.asarray(places, jnp.int32)
        self.places = np.tile(np.arange(T), (B, 1)) if places is None else places
        inside = (self.places >= 0) & (self.places < T)
        self.valid = inside & (np.take_along_axis(self.segment_ids, np.where(inside, self.places, 0), 1) >= 0)
        self.slots = slots_of(self.segment_ids, sizes)
        Tq, C = self.places.shape[1], T // sizes.stride
        query = normal(0, B, Tq, G * H, K, dtype=sizes.dtype)
        _, key, value = qkv(1, B, 1, 1, H, K, V, C=T, dtype=sizes.dtype)
        _, compressed_key, compressed_value = qkv(5, B, 1, 1, H, K, V, C=C, dtype=sizes.dtype)
        every = {
            "query": query,
            "key": key,
            "value": value,
            "x": key,
            "compressed_key": compressed_key,
            "compressed_value": compressed_value,
            **branch_gates(3, B, Tq, G * H, sizes.dtype),
        }
        self.floats = {name: every[name] for name in names}
        rng = np.random.default_rng(4)
        blocks = rng.integers(-1, np.maximum(self.places, 0)[..., None, None] // sizes.block_size + 1, (B, Tq, H, 3))
        self.block_indices = jnp.asarray(np.where(blocks < 2**20, blocks, -1), jnp.int32)

    def common(self, implementation):
        return {
            "segment_ids": jnp.asarray(self.segment_ids),
            "query_indices": self.query_indices,
            "implementation": implementation,
        }

    def masks(self, b, start, end):
        """{kind: bool [B, ...]}: what belongs to the tokens [start, end) of a segment that begins at start."""
        is_row = (np.arange(B) == b)[:, None]
        token = np.arange(self.sizes.T)
        starts, lasts = self.slots
        return {
            "query": is_row & self.valid & (self.places >= start) & (self.places < end),
            "token": is_row & (token >= start) & (token < end),
            "slot": is_row & (starts == start) & (lasts < end),
        }

    def victims(self):
        """(b, start, end, end of the segment): a whole segment, and beginnings of two."""
        (*_, (start, stop), _), ((first, last),) = (
            brute_force.segment_bounds(self.segment_ids, b, self.sizes.T) for b in range(B)
        )
        return (0, start, stop, stop), (0, start, stop - 7, stop), (1, first, (first + last) // 2, last)


class Program:
    """A compiled op with its gradients: floats and cotangents to (results, gradients by name)."""

    def __init__(self, attend, floats):
        self.attend = attend
        shapes = jax.eval_shape(attend, floats)
        self.cotangents = tuple(normal(9 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(shapes))

        @jax.jit
        def run(floats, cotangents):
            results, pullback = jax.vjp(attend, floats)
            return results, pullback(cotangents)[0]

        self.run = run


def kind_of(name):
    return "query" if name in PER_QUERY else "slot" if name in PER_SLOT else "token"


def wide(mask, like):
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def poison(x, where, seed, single=False):
    """x with NaN and infinities of both signs where `where`; single: in one element of its last axis only."""
    rng = np.random.default_rng(seed)
    bad = rng.choice([np.nan, np.inf, -np.inf], x.shape)
    where = np.broadcast_to(wide(where, x), x.shape)
    if single:
        where = where & (np.arange(x.shape[-1]) == rng.integers(x.shape[-1]))
    return jnp.where(where, jnp.asarray(bad, x.dtype), x)


def bits(x):
    return np.asarray(x).astype(np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x)


def is_same(actual, expected, where):
    np.testing.assert_array_equal(bits(actual)[where], bits(expected)[where])


def cleared(x, where):
    """x with zeros where `where`."""
    return jnp.where(wide(where, x), jnp.zeros((), x.dtype), x)


def check_containment(setting, program, victim, single):
    """One victim; `single`: of every poisoned row of an array only one element is."""
    b, start, end, stop = victim
    mine, rest = setting.masks(b, start, end), setting.masks(b, start, stop)["query"]
    clean = tuple(cleared(x, rest & ~mine["query"]) for x in program.cotangents)
    expected, expected_gradients = program.run(setting.floats, clean)
    blind = np.zeros(mine["query"].shape, bool)
    if len(expected) > 1:
        blind = np.isneginf(bits(expected[1]))  # of one branch: these see nothing, whatever they hold

    floats = {
        name: poison(
            x, wide(~mine[kind_of(name)], blind) | blind if name == "query" else ~mine[kind_of(name)], i, single
        )
        for i, (name, x) in enumerate(setting.floats.items())
    }
    dirty = tuple(poison(x, wide(~mine["query"], blind) | blind, 20 + i) for i, x in enumerate(clean))
    results, gradients = program.run(floats, dirty)

    for actual, wanted in zip(results, expected, strict=True):
        assert not np.isnan(bits(wanted)).any()
        is_same(actual, wanted, mine["query"])
    for name, gradient in gradients.items():
        is_same(gradient, expected_gradients[name], mine[kind_of(name)])
        if kind_of(name) != "query":  # only queries that see what is not finite see these
            np.testing.assert_array_equal(bits(gradient)[~mine[kind_of(name)]], 0.0)
    assert_told(setting, results, expected, gradients, mine["query"])


def assert_told(setting, results, expected, gradients, mine):
    """Queries that are poisoned, and see anything, get NaN; those at padding get nothing."""
    output, *lse = map(bits, results)
    padding = ~setting.valid
    np.testing.assert_array_equal(output[padding], 0.0)
    lost = np.broadcast_to(wide(setting.valid & ~mine, output[..., 0]), output.shape[:3])
    if lse:
        lost = lost & ~np.isneginf(bits(expected[1]))
        np.testing.assert_array_equal(lse[0][padding], -np.inf)
        assert not np.isfinite(lse[0][lost]).any()
        blind = np.isneginf(bits(expected[1]))
        np.testing.assert_array_equal(output[blind], 0.0)
        np.testing.assert_array_equal(lse[0][blind], -np.inf)
        np.testing.assert_array_equal(bits(gradients["query"])[blind], 0.0)
    assert not np.isfinite(output[lost]).any()
    np.testing.assert_array_equal(bits(gradients["query"])[padding], 0.0)
    assert np.isnan(bits(gradients["query"])[lost]).all()


def in_order(floats):
    """Query, keys, values."""
    return [floats[name] for name in sorted(floats, key=lambda name: (name != "query", name))]


def sliding(setting, implementation):
    window_size = setting.sizes.block_size + 5

    def attend(floats):
        return nsa_jax.sliding_window_attention(
            *in_order(floats), window_size=window_size, return_residual=True, **setting.common(implementation)
        )

    return attend


def compressed(setting, implementation):
    sizes = setting.sizes

    def attend(floats):
        return nsa_jax.compressed_attention(
            *in_order(floats),
            window=sizes.window,
            stride=sizes.stride,
            return_residual=True,
            **setting.common(implementation),
        )

    return attend


def selected(setting, implementation):
    def attend(floats):
        return nsa_jax.selected_attention(
            *in_order(floats),
            setting.block_indices,
            block_size=setting.sizes.block_size,
            return_residual=True,
            **setting.common(implementation),
        )

    return attend


def whole(setting, implementation, **options):
    sizes = setting.sizes
    options = {"window_size": sizes.block_size + 5, "block_counts": 2} | options

    def attend(floats):
        output = nsa_jax.native_sparse_attention(
            **floats,
            block_size=sizes.block_size,
            compression_window=sizes.window,
            compression_stride=sizes.stride,
            num_init_blocks=0,
            num_local_blocks=1,
            **options,
            **setting.common(implementation),
        )
        return (output,)

    return attend


GATES = ("compressed_gate", "selected_gate", "sliding_gate")
# name -> (function, arrays, queries, what its results are of)
OPS = {
    "sliding": (sliding, ("query", "key", "value"), "all"),
    "sliding, any places": (sliding, ("query", "key", "value"), "any"),
    "compressed": (compressed, ("query", "compressed_key", "compressed_value"), "all"),
    "compressed, any places": (compressed, ("query", "compressed_key", "compressed_value"), "any"),
    "selected": (selected, ("query", "key", "value"), "all"),
    "selected, any places": (selected, ("query", "key", "value"), "any"),
    "whole": (whole, ("query", "key", "value", *GATES), "all"),
    "whole, any places, short window": (
        functools.partial(whole, window_size=7),
        ("query", "key", "value", *GATES),
        "any",
    ),
    "whole, own compressed keys": (whole, ("query", "key", "value", *PER_SLOT, *GATES[1:]), "all"),
}


@pytest.fixture(params=["xla", "triton"])
def implementation(request):
    return request.param


@functools.cache
def prepared(name, sizes, implementation):
    """(Setting, Program), compiled once."""
    function, names, queries = OPS[name]
    setting = Setting(sizes, names, queries)
    return setting, Program(function(setting, implementation), setting.floats)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_seen_does_not_count(name, sizes, implementation):
    setting, program = prepared(name, sizes, implementation)
    for number, victim in enumerate(setting.victims()):
        check_containment(setting, program, victim, single=number == 1)


def huge(x, where, seed):
    """x with finite numbers where `where` whose products no float32 holds."""
    drawn = np.random.default_rng(seed).choice([1e19, -1e19, 1e30, -1e30, 3e38, -3e38], x.shape)
    return jnp.where(wide(where, x), jnp.asarray(drawn, x.dtype), x)


@pytest.mark.parametrize("sizes", SIZES[:1])
@pytest.mark.parametrize("name", OPS)
def test_products_that_overflow_unseen_do_not_count(name, sizes, implementation):
    """All is finite; the victim's queries are huge too, and its keys as small. What its segment's future gives to the
    gradients of its keys and values is not looked at: those queries see what is huge."""
    setting, program = prepared(name, sizes, implementation)
    scale = 2.0**63
    for b, start, end, stop in setting.victims()[:2]:
        mine, rest = setting.masks(b, start, end), setting.masks(b, start, stop)["query"]
        factors = {"query": scale, "key": 1 / scale, "compressed_key": 1 / scale}
        own = {x: y * jnp.where(wide(mine[kind_of(x)], y), factors.get(x, 1), 1) for x, y in setting.floats.items()}
        cotangents = tuple(cleared(x, rest & ~mine["query"]) for x in program.cotangents)
        expected, expected_gradients = program.run(own, cotangents)
        floats = {
            name: x if name.endswith("gate") else huge(x, ~mine[kind_of(name)], i)
            for i, (name, x) in enumerate(own.items())
        }
        results, gradients = program.run(floats, cotangents)
        for actual, wanted in zip(results, expected, strict=True):
            assert not np.isnan(bits(wanted)[mine["query"]]).any()
            is_same(actual, wanted, mine["query"])
        for name, gradient in gradients.items():
            if kind_of(name) == "query" or end == stop:
                is_same(gradient, expected_gradients[name], mine[kind_of(name)])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("whole")])
def test_who_sees_it_is_told_and_nobody_else(name, sizes, implementation):
    """One element of one head's key or value."""
    setting, program = prepared(name, sizes, implementation)
    query, key, value = setting.floats
    at = (0, (setting.slots[0][0] >= 0).sum() // 2 if key in PER_SLOT else sizes.T // 2, sizes.H - 1)
    only_there = jnp.zeros_like(setting.floats[value]).at[at].set(1)
    blank = {query: jnp.zeros_like(setting.floats[query]), key: setting.floats[key], value: only_there}
    (weights, _), _ = program.run(blank, tuple(map(jnp.zeros_like, program.cotangents)))
    told = bits(weights)[..., 0] > 0
    assert told.any() and not told.all()
    clean = tuple(cleared(x, told) for x in program.cotangents)
    expected, expected_gradients = program.run(setting.floats, clean)
    for poisoned, bad in ((key, np.nan), (value, -np.inf)):
        floats = setting.floats | {poisoned: setting.floats[poisoned].at[(*at, 1)].set(bad)}
        results, gradients = program.run(floats, tuple(poison(x, told, i) for i, x in enumerate(clean)))
        for actual, wanted in zip(results, expected, strict=True):
            is_same(actual, wanted, ~told)
            assert not np.isfinite(bits(actual)[told]).any()
        is_same(gradients[query], expected_gradients[query], ~told)
        assert np.isnan(bits(gradients[query])[told]).all()
        for shared in (key, value):
            is_same(gradients[shared], expected_gradients[shared], ...)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_whole_op_tells_who_sees_it(sizes, implementation):
    """One element of one head's value: queries before it and those of other heads keep their bits."""
    setting, program = prepared("whole", sizes, implementation)
    t, G = sizes.T // 2, sizes.G
    expected, _ = program.run(setting.floats, program.cotangents)
    floats = setting.floats | {"value": setting.floats["value"].at[0, t, 0, 0].set(np.nan)}
    results, _ = program.run(floats, program.cotangents)
    told = np.zeros(results[0].shape[:3], bool)
    told[0, t : t + 4, :G] = True  # by their sliding window
    assert np.isnan(bits(results[0])[told]).all()
    _, stop = next(s for s in brute_force.segment_bounds(setting.segment_ids, 0, sizes.T) if s[0] <= t < s[1])
    may = np.zeros_like(told)
    may[0, t:stop, :G] = True
    is_same(results[0], expected[0], ~may)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("queries", ["all", "any"])
def test_picks_of_what_is_not_seen(queries, sizes, implementation):
    setting = Setting(sizes, ("query", "compressed_key", "compressed_value"), queries)
    windows = {"window": sizes.window, "stride": sizes.stride, "key_length": sizes.T}
    _, lse = nsa_jax.compressed_attention(
        *setting.floats.values(), return_residual=True, **windows, **setting.common("xla")
    )

    @jax.jit
    def select(query, compressed_key, lse):
        return nsa_jax.select_blocks(
            query,
            compressed_key,
            lse,
            block_size=sizes.block_size,
            block_counts=2,
            num_init_blocks=0,
            num_local_blocks=1,
            **windows,
            **setting.common(implementation),
        )

    arrays = setting.floats["query"], setting.floats["compressed_key"], lse
    expected = np.asarray(select(*arrays))
    for b, start, end, _ in setting.victims():
        mine = setting.masks(b, start, end)
        kinds = ("query", "slot", "query")
        poisoned = [poison(x, ~mine[kind], i) for i, (x, kind) in enumerate(zip(arrays, kinds, strict=True))]
        picks = np.asarray(select(*poisoned))
        is_same(picks, expected, mine["query"])
        np.testing.assert_array_equal(picks[~setting.valid], -1)
        assert (picks <= expected.max(axis=-1, keepdims=True)).all()  # the query's own block is always picked
        assert ((picks[..., 1:] > picks[..., :-1]) | (picks[..., 1:] < 0)).all()
        np.testing.assert_array_equal(np.asarray(select(*poisoned)), picks)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("function", [nsa_jax.compress, nsa_jax.gather_windows])
def test_windows_of_what_is_not_theirs(function, sizes):
    """The cotangents of the victim's later windows, which may reach its tokens, stay clean."""
    setting = Setting(sizes, ("x",), "all")
    options = {"window": sizes.window, "stride": sizes.stride, "segment_ids": jnp.asarray(setting.segment_ids)}
    program = Program(lambda floats: (function(**floats, **options),), setting.floats)
    expected, expected_gradients = program.run(setting.floats, program.cotangents)
    for b, start, end, stop in setting.victims():
        mine, later = setting.masks(b, start, end), setting.masks(b, start, stop)["slot"]
        floats = {"x": poison(setting.floats["x"], ~mine["token"], 0)}
        results, gradients = program.run(floats, tuple(poison(x, ~later, 1) for x in program.cotangents))
        is_same(results[0], expected[0], mine["slot"])
        is_same(gradients["x"], expected_gradients["x"], mine["token"])
        lost = (setting.slots[0] >= 0) & ~mine["slot"]
        assert not np.isfinite(bits(results[0])[lost]).all(axis=tuple(range(1, results[0].ndim - 1))).any()
        empty = setting.slots[0] < 0
        np.testing.assert_array_equal(bits(results[0])[empty], 0.0)
        np.testing.assert_array_equal(bits(gradients["x"])[setting.segment_ids < 0], 0.0)
