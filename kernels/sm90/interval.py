"""Attention to one interval of keys on Hopper (sm_90): the forward pass of ../interval.py, in Gluon.

A unit is 64 query rows for each of three warpgroups. One warp copies a unit's queries, then its keys and values into a
ring; it is ahead by as much as the ring holds, across units too. While one warpgroup takes exponentials the others'
products run.

The pass of dq stays with ../interval.py: it would gain from queries and cotangents that wait in registers to be
multiplied, and ptxas 13.0 makes wrong code of that (it overwrites a product's operand that a loop keeps with the next
product's).
"""

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .ring import Ring, allocate_barriers
from .rows import LN2, LOG2E, UnitShape, as_columns, as_rows, copy_rows, lanes, place_of, product_layout, store_rows

WARPS = gl.constexpr(4)  # a warpgroup's warps
ROWS = gl.constexpr(64)  # query rows of a warpgroup
KEYS = gl.constexpr(64)  # keys of a slot
GROUPS = gl.constexpr(3)  # warpgroups
UNIT = gl.constexpr(192)  # query rows of all warpgroups
SCORES = gl.constexpr(product_layout(64))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalShape(UnitShape):
    """What the pass here has.

    Attributes:
        OTHERS, KEEP: see `forward`.
    """

    OTHERS: int
    KEEP: bool
    UNIT = UNIT.value


@gluon.aggregate
class Seen:
    """Pointers: int32 [B, T], the keys that each query sees, and int8 [B, T, H], its sight, see ../interval.py."""

    key_begin: gl.tensor
    key_end: gl.tensor
    sight: gl.tensor


@gluon.aggregate
class QueryRing(Ring):
    """Queries [2 * GROUPS, ROWS, K]: a slot holds a unit's, GROUPS tiles."""

    queries: gl.shared_memory_descriptor

    @gluon.jit
    def tile(self, n, GROUP: gl.constexpr):
        """The queries [ROWS, K] of a warpgroup in the n-th slot."""
        return self.queries.index(n % self.STAGES * GROUPS + GROUP)


@gluon.aggregate
class KeyRing(Ring):
    """Keys [STAGES, 1, KEYS, K] and values [STAGES, 1, KEYS, V]."""

    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor


@gluon.aggregate
class Outputs:
    """Where results go, and what the gated sum consists of; see `forward`."""

    output: gl.tensor
    lse: gl.tensor
    total: gl.tensor
    own_gate: gl.tensor
    other: gl.tensor
    other_gate: gl.tensor
    third: gl.tensor
    third_gate: gl.tensor


@gluon.constexpr_function
def _most_tokens(group):
    """A power of two no smaller than the tokens that a unit touches."""
    return 256 // group


@gluon.jit
def _intervals(seen, unit, shape, PARTITION: gl.constexpr):
    """The intervals of a unit's tokens, and which tokens there are; of the last unit where there is none.

    PARTITION: warps that ask, each of which gets all.
    """
    T: gl.constexpr = shape.T
    G: gl.constexpr = shape.G
    TOKENS: gl.constexpr = _most_tokens(G)
    tile, _, row = place_of(gl.minimum(unit, shape.UNITS - 1), shape)
    token = tile * UNIT // G + gl.arange(0, TOKENS, layout=lanes(TOKENS, PARTITION))
    real = (token < T) & (token * G < (tile + 1) * UNIT)
    base = row.to(gl.int64) * T
    begin = gl.load(seen.key_begin + base + token, mask=real, other=0)
    return begin, gl.load(seen.key_end + base + token, mask=real, other=0), real


@gluon.jit
def _steps(begin, end, C: gl.constexpr):
    """The tiles of keys [first, last) that intervals touch."""
    first = gl.min(gl.where(end > begin, begin, C), 0) // KEYS
    return first, (gl.max(gl.where(end > begin, end, 0), 0) + KEYS - 1) // KEYS


@gluon.jit
def _whole(begin, end, real, C: gl.constexpr):
    """The tiles of keys [lower, upper) that lie in all intervals."""
    return (gl.max(gl.where(real, begin, 0), 0) + KEYS - 1) // KEYS, gl.min(gl.where(real, end, C), 0) // KEYS


@gluon.jit
def _query_rows(unit, shape, GROUP: gl.constexpr, layout: gl.constexpr):
    """A warpgroup's rows: where the first stands in [B, T, N], their offsets, tokens in [B, T], which are real."""
    G: gl.constexpr = shape.G
    tile, head, row = place_of(unit, shape)
    at = tile * UNIT + GROUP * ROWS
    query_row = at + gl.arange(0, ROWS, layout=layout)
    token = query_row // G
    base = ((row.to(gl.int64) * shape.T + at // G) * shape.H + head) * G
    offset = (token - at // G) * (shape.H * G) + query_row % G
    return base, offset, row.to(gl.int64) * shape.T + token, token < shape.T


@gluon.jit
def _hide(score, j, begin, end):
    """score [ROWS, KEYS] of key tile j, -inf outside of the rows' intervals."""
    where = j * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    seen = (where[None, :] >= begin[:, None]) & (where[None, :] < end[:, None])
    return gl.where(seen, score, float("-inf"))


@gluon.jit
def _by_row(x, layout: gl.constexpr):
    """x [ROWS] as a column beside a product's result in another layout."""
    return gl.convert_layout(x, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def _allocate(query, key, value, shape):
    """The rings of queries, with two slots, and of keys."""
    STAGES: gl.constexpr = shape.STAGES
    queries = gl.allocate_shared_memory(query.dtype, [2 * GROUPS, ROWS, shape.K], gl.NVMMASharedLayout(128, 16, 2))
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, KEYS, shape.K], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES, 1, KEYS, shape.V], value.layout)
    rows_full, rows_empty = allocate_barriers(2, 1, GROUPS * WARPS)
    full, empty = allocate_barriers(STAGES, 1, GROUPS * WARPS)
    fence_async_shared()
    gl.barrier()
    return QueryRing(rows_full, rows_empty, 2, queries), KeyRing(full, empty, STAGES, keys, values)


@gluon.jit
def _copy_keys(ring, n, begin, end, key, value, row, head, shape):
    """Copies the tiles that a unit's intervals touch, from the n-th slot on, and gives the slot after them."""
    first, last = _steps(begin, end, shape.C)
    for j in range(first, last):
        ring.wait_empty(n)
        barrier = ring.expect(n, 2 * KEYS * (shape.K + shape.V))
        tma.async_load(key, [row, j * KEYS, head * shape.K], barrier, ring.keys.index(ring.slot(n)))
        tma.async_load(value, [row, j * KEYS, head * shape.V], barrier, ring.values.index(ring.slot(n)))
        n += 1
    return n


@gluon.jit
def _copy(query, key, value, seen, queries, ring, shape):
    """The copying warp."""
    K: gl.constexpr = shape.K
    G: gl.constexpr = shape.G
    done = 0
    n = 0
    for unit in range(gl.program_id(0), shape.UNITS, shape.PROGRAMS):
        tile, head, row = place_of(unit, shape)
        begin, end, _ = _intervals(seen, unit, shape, 1)
        queries.wait_empty(done)
        barrier = queries.expect(done, 2 * UNIT * K)
        for group in gl.static_range(GROUPS):
            copy_rows(query, queries.tile(done, group), barrier, row, tile * UNIT + group * ROWS, head, G, K, ROWS)
        done += 1
        n = _copy_keys(ring, n, begin, end, key, value, row, head, shape)


@gluon.jit
def _parts(p):
    """Sums of p [ROWS, KEYS] that no thread needs another for: [ROWS, 8], to be added up in the end."""
    return gl.sum(gl.reshape(p, [ROWS, KEYS // 8, 8]), 1)


@gluon.jit
def _online_step(score, peak, total, FACTOR: gl.constexpr):
    """Takes in score [ROWS, KEYS]: probabilities, by what to shrink earlier sums, peak, total (of `_parts`)."""
    new_peak = gl.maximum(peak, gl.max(score, 1) * FACTOR)
    safe = gl.where(new_peak > float("-inf"), new_peak, 0.0)
    shrink = gl.exp2(peak - safe)
    p = gl.exp2(score * FACTOR - safe[:, None])
    return p, shrink, new_peak, total * _by_row(shrink, total.type.layout) + _parts(p)


@gluon.jit
def _finish(peak, total, sums, sight):
    """As softmax.py's `finish_seen`: output [ROWS, V] and natural-log lse [ROWS]."""
    sound = (sight == 1) & (total > 0.0)
    lse = gl.where(sight == 0, float("-inf"), float("nan"))
    lse = gl.where(sound, (peak + gl.log2(total)) * LN2, lse)
    factor = gl.where(sound, 1.0 / total, gl.where(sight == 0, 0.0, float("nan")))  # of nothing, sums are 0
    return sums * _by_row(factor, sums.type.layout), lse


@gluon.constexpr_function
def _coalesced(columns):
    """The layout of rows of so many two-byte elements: 16 bytes a thread, neighbours side by side."""
    across = columns // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [WARPS.value, 1], [1, 0])


@gluon.jit
def _read_rows(source, base, offset, inside, D: gl.constexpr, layout: gl.constexpr):
    """The rows base + offset of source [.., D], where they are inside, in float32."""
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = source + base * D + (offset[:, None] * D + column[None, :])
    return gl.load(at, mask=inside[:, None], other=0.0).to(gl.float32)


@gluon.jit
def _gate(gate, base, offset, inside):
    return gl.load(gate + base + offset, mask=inside, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _store_gated_sum(own, queries, done, unit, outputs, shape, GROUP: gl.constexpr):
    """Stores what a warpgroup has, own [ROWS, V], if it is to be kept, and its gated sum with the other outputs.

    It goes through the shared memory of the warpgroup's queries, the slot `done`, which it gives back, so that each
    thread reads and writes 16 bytes at a time.
    """
    V: gl.constexpr = shape.V
    layout: gl.constexpr = _coalesced(V)
    gl.barrier()  # all warps are done with the queries
    rows = as_rows(queries.tile(done, GROUP), ROWS, V)
    rows.store(own)
    x = rows.load(layout)
    fence_async_shared()
    queries.release(done)
    base, offset, _, inside = _query_rows(unit, shape, GROUP, gl.SliceLayout(1, layout))
    sums = _gate(outputs.other_gate, base, offset, inside) * _read_rows(outputs.other, base, offset, inside, V, layout)
    if shape.OTHERS == 2:
        gate = _gate(outputs.third_gate, base, offset, inside)
        sums += gate * _read_rows(outputs.third, base, offset, inside, V, layout)
    sums += _gate(outputs.own_gate, base, offset, inside) * x.to(gl.float32)
    store_rows(outputs.total, base, offset, sums, inside, V, layout)
    if shape.KEEP:
        store_rows(outputs.output, base, offset, x, inside, V, layout)


@gluon.jit
def _attend(seen, queries, ring, outputs, shape, GROUP: gl.constexpr):
    """The forward pass of a warpgroup."""
    K: gl.constexpr = shape.K
    V: gl.constexpr = shape.V
    FACTOR: gl.constexpr = shape.SCALE * LOG2E
    of_v: gl.constexpr = product_layout(V)
    left_v: gl.constexpr = gl.DotOperandLayout(0, of_v, 2)
    dtype: gl.constexpr = queries.queries.dtype
    nothing = gl.full([ROWS, KEYS], 0.0, gl.float32, SCORES)
    done = 0
    n = 0
    begins, ends, real = _intervals(seen, gl.program_id(0), shape, WARPS)
    for unit in range(gl.program_id(0), shape.UNITS, shape.PROGRAMS):
        first, last = _steps(begins, ends, shape.C)
        lower, upper = _whole(begins, ends, real, shape.C)
        # the next unit's intervals must be there when it begins
        begins, ends, real = _intervals(seen, unit + shape.PROGRAMS, shape, WARPS)
        base, offset, token, inside = _query_rows(unit, shape, GROUP, ROW)
        begin = gl.load(seen.key_begin + token, mask=inside, other=0)
        end = gl.load(seen.key_end + token, mask=inside, other=0)
        sight = gl.load(seen.sight + token * shape.H + unit % shape.H, mask=inside, other=0)
        peak = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        weights = _parts(nothing)
        sums = gl.full([ROWS, V], 0.0, gl.float32, of_v)
        queries.wait_full(done)
        q = queries.tile(done, GROUP)
        if last > first:
            ring.wait_full(n)
            k = as_columns(ring.keys.index(ring.slot(n)), KEYS, K)
            score = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            if (first < lower) | (first >= upper):
                score = _hide(score, first, begin, end)
            p, _, peak, weights = _online_step(score, peak, weights, FACTOR)
            p = gl.convert_layout(p.to(dtype), left_v, assert_trivial=True)
            for j in range(first + 1, last):
                ring.wait_full(n + 1)
                k = as_columns(ring.keys.index(ring.slot(n + 1)), KEYS, K)
                score = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
                v = as_rows(ring.values.index(ring.slot(n)), KEYS, V)
                adding = warpgroup_mma(p, v, sums, is_async=True)
                score = warpgroup_mma_wait(1, deps=[score])
                if (j < lower) | (j >= upper):
                    score = _hide(score, j, begin, end)
                p, shrink, peak, weights = _online_step(score, peak, weights, FACTOR)
                sums = warpgroup_mma_wait(0, deps=[adding])
                ring.release(n)
                sums *= _by_row(shrink, of_v)
                p = gl.convert_layout(p.to(dtype), left_v, assert_trivial=True)
                n += 1
            v = as_rows(ring.values.index(ring.slot(n)), KEYS, V)
            adding = warpgroup_mma(p, v, sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[adding])
            ring.release(n)
            n += 1
        own, row_lse = _finish(peak, gl.convert_layout(gl.sum(weights, 1), ROW), sums, sight)
        gl.store(outputs.lse + base + offset, row_lse, mask=inside)
        own = own.to(dtype)
        if shape.OTHERS == 0:
            queries.release(done)
            store_rows(outputs.output, base, offset, own, inside, V, of_v)
        else:
            _store_gated_sum(own, queries, done, unit, outputs, shape, GROUP)
        done += 1


@gluon.jit
def forward(
    query,
    key,
    value,
    key_begin,
    key_end,
    sight,
    own_gate,
    other,
    other_gate,
    third,
    third_gate,
    output,
    lse,
    total,
    SHAPE: gl.constexpr,
):
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. SHAPE is an `IntervalShape`. Grid: PROGRAMS.

    With OTHERS, 1 or 2, also total [B, T, N, V], own_gate * output + other_gate * other + third_gate * third, the
    gates [B, T, N]; without KEEP output is then not written. Arguments that do not count are placeholders.
    """
    seen = Seen(key_begin, key_end, sight)
    outputs = Outputs(output, lse, total, own_gate, other, other_gate, third, third_gate)
    queries, ring = _allocate(query, key, value, SHAPE)
    gl.warp_specialize(
        [
            (_attend, (seen, queries, ring, outputs, SHAPE, 0)),
            (_attend, (seen, queries, ring, outputs, SHAPE, 1)),
            (_attend, (seen, queries, ring, outputs, SHAPE, 2)),
            (_copy, (query, key, value, seen, queries, ring, SHAPE)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )
