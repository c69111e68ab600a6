"""Attention to one interval of keys on Hopper (sm_90): the forward pass of interval.py, in Gluon.

A unit is 64 (token, head of the group) pairs for each of three warpgroups. A warp of its own copies a unit's queries,
then its keys and values into a ring of STAGES slots; it is ahead by as much as the ring holds, across units too. While
one warpgroup takes exponentials the others' products run.

The pass of dq stays with interval.py: it gains from queries and cotangents that wait in registers to be multiplied,
and ptxas 13.0 makes wrong code of that (a product's operand that a loop keeps is overwritten by the next product's).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import LN2, LOG2E, arrive, as_columns, as_rows, copy_rows, lanes, place_of, product_layout, store_rows

WARPS = gl.constexpr(4)  # of a warpgroup
ROWS = gl.constexpr(64)  # of a warpgroup
KEYS = gl.constexpr(64)  # of a slot
GROUPS = gl.constexpr(3)  # warpgroups
UNIT = gl.constexpr(192)  # rows of all of them
SCORES = gl.constexpr(product_layout(64))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))


@gluon.constexpr_function
def _most_tokens(group):
    """A power of two no smaller than the tokens that a unit touches."""
    return 256 // group


@gluon.jit
def _intervals(
    unit, key_begin, key_end, T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, B: gl.constexpr, TILES: gl.constexpr,
    PARTITION: gl.constexpr,
):  # fmt: skip
    """The intervals of a unit's tokens, and which tokens there are; of the last unit where there is none.

    PARTITION: warps that ask, each of which gets all.
    """
    TOKENS: gl.constexpr = _most_tokens(G)
    tile, _, row = place_of(gl.minimum(unit, TILES * H * B - 1), H, B, TILES)
    token = tile * UNIT // G + gl.arange(0, TOKENS, layout=lanes(TOKENS, PARTITION))
    real = (token < T) & (token * G < (tile + 1) * UNIT)
    base = row.to(gl.int64) * T
    begin = gl.load(key_begin + base + token, mask=real, other=0)
    return begin, gl.load(key_end + base + token, mask=real, other=0), real


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
def _copy_keys(
    begin, end, n, key, value, row, head, keys, values, full, empty, C: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the tiles that a unit's intervals touch, from the n-th slot on, and gives the slot after them."""
    first, last = _steps(begin, end, C)
    for j in range(first, last):
        slot = n % STAGES
        mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), 2 * KEYS * (K + V))
        tma.async_load(key, [row, j * KEYS, head * K], full.index(slot), keys.index(slot))
        tma.async_load(value, [row, j * KEYS, head * V], full.index(slot), values.index(slot))
        n += 1
    return n


@gluon.jit
def _rows_of(
    unit, layout: gl.constexpr, GROUP: gl.constexpr, T: gl.constexpr, H: gl.constexpr, G: gl.constexpr,
    B: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Of a warpgroup's rows: where the first stands in [B, T, N], their offsets, tokens in [B, T], which are real."""
    tile, head, row = place_of(unit, H, B, TILES)
    at = tile * UNIT + GROUP * ROWS
    slot = at + gl.arange(0, ROWS, layout=layout)
    token = slot // G
    base = ((row.to(gl.int64) * T + at // G) * H + head) * G
    return base, (token - at // G) * (H * G) + slot % G, row.to(gl.int64) * T + token, token < T


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
def _allocate(key, value, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr):
    """The ring of keys and values, and barriers for "filled" and "free" of two units' rows and of its slots."""
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, KEYS, K], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES, 1, KEYS, V], value.layout)
    rows_full = mbarrier.allocate_mbarrier(batch=2)
    rows_empty = mbarrier.allocate_mbarrier(batch=2)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(2):
        mbarrier.init(rows_full.index(i), count=1)
        mbarrier.init(rows_empty.index(i), count=GROUPS * WARPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS * WARPS)
    fence_async_shared()
    gl.barrier()
    return keys, values, rows_full, rows_empty, full, empty


@gluon.jit
def _copy(
    query, key, value, key_begin, key_end, queries, keys, values, rows_full, rows_empty, full, empty,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    B: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    done = 0
    n = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = place_of(unit, H, B, TILES)
        begin, end, _ = _intervals(unit, key_begin, key_end, T, H, G, B, TILES, 1)
        buffer = done % 2
        mbarrier.wait(rows_empty.index(buffer), ((done // 2) & 1) ^ 1)
        mbarrier.expect(rows_full.index(buffer), 2 * UNIT * K)
        for group in gl.static_range(GROUPS):
            at = tile * UNIT + group * ROWS
            copy_rows(query, queries.index(buffer * GROUPS + group), rows_full.index(buffer), row, at, head, G, K, ROWS)
        done += 1
        n = _copy_keys(begin, end, n, key, value, row, head, keys, values, full, empty, C, K, V, STAGES)


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


@gluon.constexpr_function
def _coalesced(columns):
    """Of rows of so many elements of two bytes: 16 bytes a thread, neighbours side by side."""
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
def _store_gated_sum(
    own, tile, rows_empty, unit, output, total, own_gate, other, other_gate, third, third_gate, GROUP: gl.constexpr,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, V: gl.constexpr, B: gl.constexpr, TILES: gl.constexpr,
    OTHERS: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Stores what a warpgroup has, own [ROWS, V], if it is to be kept, and its gated sum with the other outputs.

    It goes through `tile`, its queries' shared memory, so that each thread reads and writes 16 bytes at a time.
    """
    layout: gl.constexpr = _coalesced(V)
    gl.barrier()  # all warps are done with the queries
    rows = as_rows(tile, ROWS, V)
    rows.store(own)
    x = rows.load(layout)
    fence_async_shared()
    arrive(rows_empty)
    base, offset, _, inside = _rows_of(unit, gl.SliceLayout(1, layout), GROUP, T, H, G, B, TILES)
    sums = _gate(other_gate, base, offset, inside) * _read_rows(other, base, offset, inside, V, layout)
    if OTHERS == 2:
        sums += _gate(third_gate, base, offset, inside) * _read_rows(third, base, offset, inside, V, layout)
    sums += _gate(own_gate, base, offset, inside) * x.to(gl.float32)
    store_rows(total, base, offset, sums, inside, V, layout)
    if KEEP:
        store_rows(output, base, offset, x, inside, V, layout)


@gluon.jit
def _attend(
    key_begin, key_end, output, lse, total, own_gate, other, other_gate, third, third_gate, queries, keys, values,
    rows_full, rows_empty, full, empty, GROUP: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    B: gl.constexpr, SCALE: gl.constexpr, OTHERS: gl.constexpr, KEEP: gl.constexpr, TILES: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The forward pass of a warpgroup."""
    FACTOR: gl.constexpr = SCALE * LOG2E
    of_v: gl.constexpr = product_layout(V)
    left_v: gl.constexpr = gl.DotOperandLayout(0, of_v, 2)
    dtype: gl.constexpr = queries.dtype
    nothing = gl.full([ROWS, KEYS], 0.0, gl.float32, SCORES)
    done = 0
    n = 0
    begins, ends, real = _intervals(gl.program_id(0), key_begin, key_end, T, H, G, B, TILES, WARPS)
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        first, last = _steps(begins, ends, C)
        lower, upper = _whole(begins, ends, real, C)
        # of the next unit, to be there when it begins
        begins, ends, real = _intervals(unit + PROGRAMS, key_begin, key_end, T, H, G, B, TILES, WARPS)
        base, offset, token, inside = _rows_of(unit, ROW, GROUP, T, H, G, B, TILES)
        begin = gl.load(key_begin + token, mask=inside, other=0)
        end = gl.load(key_end + token, mask=inside, other=0)
        peak = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        weights = _parts(nothing)
        sums = gl.full([ROWS, V], 0.0, gl.float32, of_v)
        buffer = done % 2
        mbarrier.wait(rows_full.index(buffer), (done // 2) & 1)
        q = queries.index(buffer * GROUPS + GROUP)
        if last > first:
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            score = warpgroup_mma(q, as_columns(keys.index(slot), KEYS, K), nothing, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            if (first < lower) | (first >= upper):
                score = _hide(score, first, begin, end)
            p, _, peak, weights = _online_step(score, peak, weights, FACTOR)
            p = gl.convert_layout(p.to(dtype), left_v, assert_trivial=True)
            for j in range(first + 1, last):
                ahead = (n + 1) % STAGES
                mbarrier.wait(full.index(ahead), ((n + 1) // STAGES) & 1)
                score = warpgroup_mma(q, as_columns(keys.index(ahead), KEYS, K), nothing, use_acc=False, is_async=True)
                adding = warpgroup_mma(p, as_rows(values.index(n % STAGES), KEYS, V), sums, is_async=True)
                score = warpgroup_mma_wait(1, deps=[score])
                if (j < lower) | (j >= upper):
                    score = _hide(score, j, begin, end)
                p, shrink, peak, weights = _online_step(score, peak, weights, FACTOR)
                sums = warpgroup_mma_wait(0, deps=[adding])
                arrive(empty.index(n % STAGES))
                sums *= _by_row(shrink, of_v)
                p = gl.convert_layout(p.to(dtype), left_v, assert_trivial=True)
                n += 1
            adding = warpgroup_mma(p, as_rows(values.index(n % STAGES), KEYS, V), sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[adding])
            arrive(empty.index(n % STAGES))
            n += 1
        done += 1
        weight = gl.convert_layout(gl.sum(weights, 1), ROW)
        seen = weight > 0.0
        weight = gl.where(seen, weight, 1.0)
        gl.store(lse + base + offset, gl.where(seen, (peak + gl.log2(weight)) * LN2, float("-inf")), mask=inside)
        own = (sums * _by_row(1.0 / weight, of_v)).to(dtype)
        if OTHERS == 0:
            arrive(rows_empty.index(buffer))
            store_rows(output, base, offset, own, inside, V, of_v)
        else:
            _store_gated_sum(
                own, q, rows_empty.index(buffer), unit, output, total, own_gate, other, other_gate, third, third_gate,
                GROUP, T, H, G, V, B, TILES, OTHERS, KEEP,
            )  # fmt: skip


@gluon.jit
def forward(
    query, key, value, key_begin, key_end, own_gate, other, other_gate, third, third_gate, output, lse, total,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    B: gl.constexpr, SCALE: gl.constexpr, OTHERS: gl.constexpr, KEEP: gl.constexpr, TILES: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. Grid: PROGRAMS.

    With OTHERS, 1 or 2, also total [B, T, N, V], own_gate * output + other_gate * other + third_gate * third, the
    gates [B, T, N]; without KEEP output is then not written. Arguments that do not count are placeholders.
    """
    queries = gl.allocate_shared_memory(query.dtype, [2 * GROUPS, ROWS, K], gl.NVMMASharedLayout(128, 16, 2))
    keys, values, rows_full, rows_empty, full, empty = _allocate(key, value, K, V, STAGES)
    gl.warp_specialize(
        [
            (_attend, (
                key_begin, key_end, output, lse, total, own_gate, other, other_gate, third, third_gate, queries, keys,
                values, rows_full, rows_empty, full, empty, 0,
                T, C, H, G, K, V, B, SCALE, OTHERS, KEEP, TILES, PROGRAMS, STAGES,
            )),
            (_attend, (
                key_begin, key_end, output, lse, total, own_gate, other, other_gate, third, third_gate, queries, keys,
                values, rows_full, rows_empty, full, empty, 1,
                T, C, H, G, K, V, B, SCALE, OTHERS, KEEP, TILES, PROGRAMS, STAGES,
            )),
            (_attend, (
                key_begin, key_end, output, lse, total, own_gate, other, other_gate, third, third_gate, queries, keys,
                values, rows_full, rows_empty, full, empty, 2,
                T, C, H, G, K, V, B, SCALE, OTHERS, KEEP, TILES, PROGRAMS, STAGES,
            )),
            (_copy, (
                query, key, value, key_begin, key_end, queries, keys, values, rows_full, rows_empty, full, empty,
                T, C, H, G, K, V, B, TILES, PROGRAMS, STAGES,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
