"""Kernels of the selected branch by themselves: queries anywhere in the key row, and what they do not see.

Queries stand at any places, in any order, several at one. What a query does not see, and what stands at queries that
see nothing or whose result is NaN, reaches neither another row nor a key.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, assert_small_error_ratio, launch_alone, normal

from nsa_jax import tiling
from nsa_jax.gpu.sm90 import key_pass, selected
from nsa_jax.runtime import launch

H, S, SCALE, NOWHERE = 2, 3, 0.3, 2**31 - 1
BLIND = (0, 7, 38)  # queries that see nothing
NAN_QUERY, SEES_NAN = (30, 1), (20, 2)  # (query, head of the query)

# the interpreter's maximum of a row that is NaN
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


class Case:
    """Queries of one batch row, the keys they stand at, and the blocks they want: 0 of them at BLIND queries.

    Attributes:
        place: int [T].
        seen: bool [2, T, H, C], what the queries see of selected blocks and of the sliding window.
        first_keys: int32 [T, H, S + X], as block_lists.py takes them.
    """

    def __init__(self, T, C, group, width, block, window, dtype, in_order):
        self.T, self.C, self.group, self.width, self.block, self.window = T, C, group, width, block, window
        self.dtype = dtype
        rng = np.random.default_rng(T)
        starts = np.array([0, 3 * C // 7])  # of the segments
        place = rng.integers(0, C, T)
        place[5 : 5 + T // 2] = 4 * C // 7  # candidates at one place, more than a block has keys
        place[list(BLIND)] = C - 1
        if in_order:
            place = np.sort(place)
        self.place = place
        self.blind = [t for t in range(T) if t in BLIND]
        start = starts[np.searchsorted(starts, place, "right") - 1]
        keys = np.arange(C)
        touched = 1 + (window + block - 2) // block if window else 0
        self.first_keys = np.full((T, H, S + touched), NOWHERE, np.int32)
        self.seen = np.zeros((2, T, H, C), bool)
        for t, h in itertools.product(range(T), range(H)):
            if t in self.blind:
                continue
            own = (place[t] - start[t]) // block
            picks = start[t] + rng.integers(0, own + 1, S) * block
            self.first_keys[t, h, :S] = picks
            for first in picks:
                self.seen[0, t, h] |= (keys >= first) & (keys < first + block) & (keys <= place[t])
            if window:
                near = (keys > place[t] - window) & (keys >= start[t]) & (keys <= place[t])
                self.seen[1, t, h] = near
                blocks = np.unique((keys[near] - start[t]) // block)
                self.first_keys[t, h, S : S + len(blocks)] = start[t] + blocks * block
        self.starts, self.start = starts, start

    def arrays(self):
        """query, key, value, d_output [1, T|C, N|H, D] and, of each branch, the weight [1, T, N]."""
        N, D = H * self.group, self.width
        shapes = (1, self.T, N, D), (1, self.C, H, D), (1, self.C, H, D), (1, self.T, N, D)
        weights = [0.5 + jnp.abs(normal(10 + i, 1, self.T, N)) for i in range(2)]
        return [normal(i, *shape, dtype=self.dtype) for i, shape in enumerate(shapes)], weights

    def sight(self):
        """[selected, sliding], int8 [1, T, H]; the key-value head of SEES_NAN sees one that is not finite."""
        sight = self.seen.any(3).astype(np.int8)
        sight[:, SEES_NAN[0], SEES_NAN[1] // self.group] *= 2
        return [jnp.asarray(x)[None] for x in sight]

    def rows(self, *rows):
        """[1, T, N]: true for the heads (query, head) of `rows`, an int being all heads of a query."""
        which = np.zeros((1, self.T, H * self.group), bool)
        for row in rows:
            query, head = row if isinstance(row, tuple) else (row, slice(None))
            which[0, query, head] = True
        return which

    def nan_rows(self):
        """The rows whose result is NaN where NAN_QUERY's query is: [1, T, N]."""
        heads = np.arange(H * self.group) // self.group == SEES_NAN[1] // self.group
        return self.rows(NAN_QUERY) | (self.rows(SEES_NAN[0]) & heads)

    def expected(self, query, key, value, branch):
        """(output [1, T, N, D], lse [1, T, N]) of a branch in float32."""
        seen = jnp.asarray(np.repeat(self.seen[branch], self.group, 1))  # [T, N, C]
        k, v = (jnp.repeat(x[0].astype(jnp.float32), self.group, 1) for x in (key, value))
        score = jnp.einsum("tnd,cnd->tnc", query[0].astype(jnp.float32), k, precision="highest") * SCALE
        score = jnp.where(seen, score, -jnp.inf)
        lse = jax.nn.logsumexp(score, axis=2)
        p = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isinf(lse), 0.0, lse)[..., None]), 0.0)
        return jnp.einsum("tnc,cnd->tnd", p, v, precision="highest")[None], lse[None]


class Portable:
    """Launches of kernels/selected.py and selected_keys.py."""

    def __init__(self, case):
        self.case = case

    def _shape(self, **sizes):
        parts = tiling.parts(self.case.width)
        sizes |= {"WINDOW": self.case.window, "K_PARTS": parts, "V_PARTS": parts, "PRECISION": "ieee", "KEYS": 16}
        return self._sizes() | sizes

    def _sizes(self):
        case, width = self.case, self.case.width
        sizes = {"T": case.T, "C": case.C, "H": H, "G": case.group, "K": width, "V": width}
        return sizes | {"SCALE": SCALE, "BLOCK": case.block}

    def walks(self, kernel, tokens, parts=()):
        from nsa_jax.kernels import block_lists

        case = self.case
        first_keys, place = jnp.asarray(case.first_keys)[None], jnp.asarray(case.place, jnp.int32)[None]
        entries = case.first_keys.shape[2]
        sizes = {"T": case.T, "H": H, "S": entries, "CHOSEN": S, "BLOCK": case.block, "WINDOW": case.window}
        shape = block_lists.WalkShape(**sizes, TOKENS=tokens, PER_PROGRAM=2, WIDE=False, SORTED=False)
        starts = [jnp.asarray(case.start, jnp.int32)[None]] if parts else []
        lists = 1, H, shape.TILES, *parts, shape.ENTRIES // (2 if parts else 1)
        outputs = [jax.ShapeDtypeStruct(s, jnp.int32) for s in (lists, lists, lists[:3], lists[:3])]
        options = {"outputs": outputs, "programs": -(-shape.TILES // 2) * H, "SHAPE": shape}
        return launch_alone(getattr(block_lists, kernel), first_keys, place, *starts, **options)

    def _walk(self, kernel, arrays, outputs, last=(), **constants):
        from nsa_jax.kernels import selected_shape

        tokens = 4
        shape = selected_shape.QueryShape(
            **self._shape(TOKENS=tokens, ROWS=16, ENTRIES=tokens * self.case.first_keys.shape[2], AHEAD=True)
        )
        query, key, value, *arrays = arrays
        place = jnp.asarray(self.case.place, jnp.int32)[None]
        arrays = *launch.key_tiles(kernel, 16, key, value), *arrays, place, *self.walks("walk", tokens), *last
        return launch_alone(kernel, query, *arrays, outputs=outputs, programs=shape.TILES * H, SHAPE=shape, **constants)

    def forward(self, query, key, value, sight):
        """[(output, lse)] of the branches."""
        from nsa_jax.kernels.selected import forward

        output, lse = like(query), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
        results = self._walk(forward, (query, key, value), (output, lse) * 2, sight)
        return [results[:2], results[2:]][: 2 if self.case.window else 1]

    def backward_query(self, query, key, value, d_output, branches, before=None):
        """(d_query, [delta]); branches: (output, lse, weight)."""
        from nsa_jax.kernels.selected import backward_query

        lse = branches[0][1]
        arrays = query, key, value, d_output, *branches[0], *branches[-1], lse, query if before is None else before
        d_query, *deltas = self._walk(
            backward_query, arrays, (like(query), like(lse), like(lse)), HAS_D_LSE=False, HAS_BEFORE=before is not None
        )
        return d_query, deltas[: len(branches)]

    def items(self, chunk):
        """place, then the arrays of items and blocks as key passes take them, and (blocks, items, further ones)."""
        case = self.case
        assert (np.diff(case.place) >= 0).all()
        ends = [*case.starts[1:], case.C]
        begin = np.concatenate([np.arange(a, b, case.block) for a, b in zip(case.starts, ends, strict=True)])
        of_segment = [-(-(b - a) // case.block) for a, b in zip(case.starts, ends, strict=True)]
        end = np.minimum(begin + case.block, np.repeat(ends, of_segment))
        choosers, columns, further, total = [], [[] for _ in range(H)], [0] * H, []
        for h in range(H):
            for m, first in enumerate(begin):
                wanted = case.first_keys[:, h] == first
                mine = [2 * t + int(wanted[t, :S].any()) for t in range(case.T) if wanted[t].any()]
                for rank in range(0, max(len(mine), 1), chunk):
                    part = mine[rank : rank + chunk]
                    columns[h].append((m, len(choosers), len(part), rank, further[h] if rank else -1))
                    further[h] += bool(rank)
                    choosers += part
            total.append(len(columns[h]))
        most = max(total)
        padded = [column + [(0, 0, 0, 0, -1)] * (most - len(column)) for column in columns]
        arrays = np.moveaxis(np.asarray(padded, np.int32), 2, 0)[:, None]  # [5, 1, H, items]
        near = [(case.place < first + case.block + case.window).sum() - (case.place < first).sum() for first in begin]
        as_int = functools.partial(jnp.asarray, dtype=jnp.int32)
        blocks = [as_int(x)[None] for x in (begin, end, near)]
        columns = as_int(case.place)[None], as_int(choosers), *map(as_int, arrays), as_int(total)[None], *blocks
        return columns, {"BLOCKS": len(begin), "ITEMS": most, "MORE": max(*further, 1)}

    def gathered(self, d_key, d_value, d_key_more, d_value_more, arrays):
        """d_key and d_value [1, C, H, D], the further items added."""
        block, more, begin, end = (np.asarray(arrays[i][0]) for i in (2, 6, 8, 9))
        sums = [np.array(x, np.float32) for x in (d_key, d_value)]
        for (h, i), number in np.ndenumerate(more):
            if number >= 0:
                first, last = begin[block[h, i]], end[block[h, i]]
                for total, further in zip(sums, (d_key_more, d_value_more), strict=True):
                    total[0, first:last, h] += np.asarray(further)[0, h, number, : last - first]
        return sums

    def backward_key_value(self, query, key, value, d_output, rows):
        """[d_key, d_value]; rows: (lse, delta, weight) per branch."""
        from nsa_jax.kernels import selected_keys, selected_shape

        arrays, sizes = self.items(chunk=11)
        shape = selected_shape.KeyShape(**self._shape(ROWS=16, PROGRAMS=3, **sizes))
        inputs = query, key, value, d_output, *rows[0], *rows[-1], *arrays
        options = {"outputs": self._outputs(sizes), "programs": shape.PIECES * 3 * H, "SHAPE": shape}
        return self.gathered(*launch_alone(selected_keys.backward_key_value, *inputs, **options), arrays)

    def _outputs(self, sizes):
        case = self.case
        first = jax.ShapeDtypeStruct((1, case.C, H, case.width), jnp.float32)
        more = jax.ShapeDtypeStruct((1, H, sizes["MORE"], case.block, case.width), jnp.float32)
        return first, first, more, more


class Hopper(Portable):
    """Launches of kernels/sm90/selected.py and selected_keys.py."""

    def _sizes(self):
        return super()._sizes() | {"KEYS": 64}

    def _walk(self, kernel, arrays, outputs, last=(), **constants):
        from nsa_jax.kernels import selected_shape

        case, tokens = self.case, 128 // self.case.group
        walks = self.walks("walk_in_pairs", 2 * tokens, (2,))
        pairs = walks[0].shape[2]
        sizes = {"TOKENS": tokens, "ENTRIES": tokens * S, "TOGETHER": selected.together(case.group)}
        sizes |= {"TILES": pairs, "UNITS": pairs * H, "PROGRAMS": 2, "STAGES": 3}
        shape = selected_shape.PairedShape(**self._sizes(), **sizes)
        query, key, value, *arrays = arrays
        keys, place = (launch.key_pieces(x) for x in (key, value)), jnp.asarray(case.place, jnp.int32)[None]
        arrays = query, *keys, *arrays, place, *walks, *last
        return launch_alone(kernel, *arrays, outputs=outputs, programs=2, warps=8, SHAPE=shape, **constants)

    def forward(self, query, key, value, sight):
        from nsa_jax.kernels.sm90.selected import forward

        outputs = like(query), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
        return [self._walk(forward, (query, key, value), outputs, sight[:1])]

    def backward_query(self, query, key, value, d_output, branches, before=None):
        from nsa_jax.kernels.sm90.selected import backward_query

        ((output, lse, weight),) = branches
        arrays = query, key, value, d_output, output, lse, weight, lse, query if before is None else before
        d_query, delta = self._walk(
            backward_query, arrays, (like(query), like(lse)), HAS_D_LSE=False, HAS_BEFORE=before is not None
        )
        return d_query, [delta]

    def backward_key_value(self, query, key, value, d_output, rows):
        from nsa_jax.kernels import selected_shape
        from nsa_jax.kernels.sm90 import selected_keys

        arrays, sizes = self.items(chunk=11)
        stages = key_pass.stages(self.case.width, self.case.width)
        shape = selected_shape.KeyRingShape(**self._sizes(), PROGRAMS=3, STAGES=stages, **sizes)
        query, d_output = (launch.token_pieces(x, self.case.group) for x in (query, d_output))
        inputs = query, launch.key_pieces(key), launch.key_pieces(value), d_output, *rows[0], *arrays
        options = {"outputs": self._outputs(sizes), "programs": shape.PIECES * 3 * H, "SHAPE": shape}
        results = launch_alone(selected_keys.backward_key_value, *inputs, registers=key_pass.REGISTERS, **options)
        return self.gathered(*results, arrays)


def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


PORTABLE = {"pointers": (20, 16, 0), "descriptors": (16, 32, 0), "window": (16, 16, 3)}
HOPPER = {f"hopper {group} {width}": (group, width) for group, width in ((16, 128), (8, 64), (64, 128), (128, 64))}


@pytest.fixture(params=[*PORTABLE, *(pytest.param(name, marks=pytest.mark.gpu) for name in HOPPER)])
def kernels_of(request):
    """in_order -> the launches of a case."""
    if request.param in HOPPER:
        request.getfixturevalue("hopper")
        group, width = HOPPER[request.param]
        return lambda in_order: Hopper(Case(310, 450, group, width, 128, 0, jnp.bfloat16, in_order))
    width, block, window = PORTABLE[request.param]
    return lambda in_order: Portable(Case(45, 90, 3, width, block, window, jnp.float32, in_order))


def poisoned(x, which):
    """x [1, T, N, ...], NaN and infinities in the rows `which` [1, T, N]."""
    bad = np.where(np.arange(x.size).reshape(x.shape) % 3 == 0, np.inf, np.nan)
    return jnp.where(which.reshape(*which.shape, *(1,) * (x.ndim - 3)), jnp.asarray(bad, x.dtype), x)


def check(actual, expected, dtype):
    if dtype == jnp.float32:
        assert_close([jnp.asarray(actual)], [jnp.asarray(expected, jnp.float32)])
    else:
        assert_small_error_ratio([actual], [expected], 0.005)


def test_forward(kernels_of):
    kernels = kernels_of(in_order=False)
    case = kernels.case
    (query, key, value, _), _ = case.arrays()
    clean = kernels.forward(query, key, value, case.sight())
    bad = case.rows(NAN_QUERY, *case.blind)
    results = kernels.forward(poisoned(query, bad), key, value, case.sight())
    nan, blind = case.nan_rows(), case.rows(*case.blind)
    for i, ((output, lse), (clean_output, clean_lse)) in enumerate(zip(results, clean, strict=True)):
        expected, expected_lse = case.expected(query, key, value, i)
        finite = ~nan & ~blind
        check(clean_output[finite], expected[finite], case.dtype)
        check(clean_lse[finite], expected_lse[finite], case.dtype)
        assert_same_bits([output[~nan], lse[~nan]], [clean_output[~nan], clean_lse[~nan]])
        assert (np.asarray(output, np.float32)[blind] == 0).all() and np.isneginf(np.asarray(lse)[blind]).all()
        assert np.isnan(np.asarray(output, np.float32)[nan]).all() and np.isnan(np.asarray(lse)[nan]).all()


def branches_of(kernels, query, key, value, weights):
    """(output, lse, weight) of the branches, where every query that sees something sees what is finite."""
    sight = [jnp.minimum(x, 1) for x in kernels.case.sight()]
    return [(*pair, weight) for pair, weight in zip(kernels.forward(query, key, value, sight), weights, strict=False)]


def gradients(case, query, key, value, d_output, weights):
    """d_query, d_key, d_value of sum(d_output * weight * output), summed over the branches."""

    def loss(query, key, value):
        branches = range(2 if case.window else 1)
        outputs = (weights[i][..., None] * case.expected(query, key, value, i)[0] for i in branches)
        return sum(jnp.sum(output * d_output.astype(jnp.float32)) for output in outputs)

    arrays = (x.astype(jnp.float32) for x in (query, key, value))
    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_backward_query(kernels_of, added):
    kernels = kernels_of(in_order=False)
    case = kernels.case
    (query, key, value, d_output), weights = case.arrays()
    branches = branches_of(kernels, query, key, value, weights)
    before = normal(9, *query.shape, dtype=query.dtype) if added else None
    blind, nan = case.rows(*case.blind), case.nan_rows()
    expected = gradients(case, query, key, value, d_output, weights)[0] + (before.astype(jnp.float32) if added else 0.0)
    clean, clean_deltas = kernels.backward_query(query, key, value, d_output, branches, before)
    check(clean[~blind], expected[~blind], case.dtype)

    bad = case.rows(NAN_QUERY, *case.blind)
    hidden = [
        (jnp.where(nan[..., None], jnp.nan, output), jnp.where(nan, jnp.nan, lse), poisoned(weight, blind))
        for output, lse, weight in branches
    ]
    d_query, deltas = kernels.backward_query(
        poisoned(query, bad), key, value, poisoned(d_output, case.rows(*case.blind)), hidden, before
    )
    assert_same_bits([d_query[~nan]], [clean[~nan]])
    assert_same_bits([delta[~nan] for delta in deltas], [delta[~nan] for delta in clean_deltas])
    assert np.isnan(np.asarray(d_query, np.float32)[nan]).all()
    np.testing.assert_array_equal(np.asarray(d_query[blind]), np.asarray(before[blind]) if added else 0)
    for delta in deltas:
        np.testing.assert_array_equal(np.asarray(delta)[blind], 0.0)


def test_backward_key_value(kernels_of):
    kernels = kernels_of(in_order=True)
    case = kernels.case
    (query, key, value, d_output), weights = case.arrays()
    nan, blind = case.nan_rows(), case.rows(*case.blind)
    dead = nan | blind
    alive_weights = [jnp.where(dead, 0.0, weight) for weight in weights]
    branches = branches_of(kernels, query, key, value, alive_weights)
    _, deltas = kernels.backward_query(query, key, value, d_output, branches)
    rows = [
        (jnp.where(nan, jnp.nan, jnp.where(blind, -jnp.inf, lse)), poisoned(delta, dead), poisoned(weight, dead))
        for (_, lse, weight), delta in zip(branches, deltas, strict=True)
    ]
    clean = kernels.backward_key_value(query, key, value, d_output, rows)
    expected = gradients(case, query, key, value, d_output, alive_weights)[1:]
    for actual, wanted in zip(clean, expected, strict=True):
        check(actual, wanted, case.dtype)
    results = kernels.backward_key_value(poisoned(query, dead), key, value, poisoned(d_output, dead), rows)
    assert_same_bits(results, clean)
