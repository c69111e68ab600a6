"""Attention to one interval of keys on Hopper (sm_90): the pass of interval.py from the keys' side, in Gluon.

See hopper_keys.py. A program has a tile of keys and one of SHARES shares of the row's queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_init, warpgroup_mma_wait

from .hopper import as_rows, copy_rows, product_layout
from .hopper_keys import (
    KEY,
    KEYS,
    LANES,
    ROW,
    ROWS,
    WARPS,
    add_gradients,
    allocate,
    bring_statistics,
    probabilities,
    store_keys,
)


@gluon.jit
def _program(H: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr):
    """The tile of keys, the share, the head and the row of this program."""
    program = gl.program_id(0)
    # those that run together have the same share; late queries, which most tiles are seen by, first
    share = SHARES - 1 - program // TILES % SHARES
    return program % TILES, share, program // (TILES * SHARES) % H, program // (TILES * SHARES * H)


@gluon.jit
def _intervals(query_begin, query_end, tile, row, C: gl.constexpr, layout: gl.constexpr):
    """The queries [begin, end) that see each key [KEYS], and which keys are real."""
    place = tile * KEYS + gl.arange(0, KEYS, layout=layout)
    base = row.to(gl.int64) * C
    inside = place < C
    begin = gl.load(query_begin + base + place, mask=inside, other=0)
    return begin, gl.load(query_end + base + place, mask=inside, other=0), inside


@gluon.jit
def _slots(begin, end, share, T: gl.constexpr, G: gl.constexpr, SHARES: gl.constexpr):
    """The slots of rows [first, last) in the share that any key is seen by."""
    SHARE: gl.constexpr = (T * G + ROWS * SHARES - 1) // (ROWS * SHARES)
    first = gl.min(gl.where(end > begin, begin, T), 0) * G // ROWS
    last = (gl.max(gl.where(end > begin, end, 0), 0) * G + ROWS - 1) // ROWS
    return gl.maximum(first, share * SHARE), gl.minimum(last, share * SHARE + SHARE)


@gluon.jit
def _nth(n, first, last):
    """The n-th slot that a program takes. Of slots that lie in their reach, all programs take the same one n-th: those
    that run together then read it from memory once."""
    count = last - first
    return first + (n + count - first % count) % count


@gluon.jit
def _copy(
    query, d_output, key, value, query_begin, query_end, keys, values, queries, cotangents, keys_full, full, empty,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    TILES: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    tile, share, head, row = _program(H, TILES, SHARES)
    mbarrier.expect(keys_full, 2 * KEYS * (K + V))
    tma.async_load(key, [row, tile * KEYS, head * K], keys_full, keys)
    tma.async_load(value, [row, tile * KEYS, head * V], keys_full, values)
    begin, end, _ = _intervals(query_begin, query_end, tile, row, C, LANES)
    first, last = _slots(begin, end, share, T, G, SHARES)
    for n in range(last - first):
        at = _nth(n, first, last) * ROWS
        slot = n % STAGES
        mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), 2 * ROWS * (K + V))
        copy_rows(query, queries.index(slot), full.index(slot), row, at, head, G, K, ROWS)
        copy_rows(d_output, cotangents.index(slot), full.index(slot), row, at, head, G, V, ROWS)


@gluon.jit
def _bring(
    lse, delta, weight, query_begin, query_end, statistics, full, empty,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings the rows' statistics."""
    tile, share, head, row = _program(H, TILES, SHARES)
    begin, end, _ = _intervals(query_begin, query_end, tile, row, C, LANES)
    first, last = _slots(begin, end, share, T, G, SHARES)
    for n in range(last - first):
        at = _nth(n, first, last) * ROWS
        place = at + gl.arange(0, ROWS, layout=LANES)
        base = ((row.to(gl.int64) * T + at // G) * H + head) * G
        offset = base + (place // G - at // G) * (H * G) + place % G
        bring_statistics(lse, delta, weight, offset, place < T * G, statistics, full, empty, n, STAGES)


@gluon.jit
def _multiply(
    query_begin, query_end, d_key, d_value, keys, values, queries, cotangents, statistics, keys_full, full, empty,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    B: gl.constexpr, SCALE: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warpgroup."""
    of_k: gl.constexpr = product_layout(K)
    of_v: gl.constexpr = product_layout(V)
    tile, share, head, row = _program(H, TILES, SHARES)
    begin, end, inside = _intervals(query_begin, query_end, tile, row, C, gl.BlockedLayout([2], [32], [WARPS], [0]))
    first, last = _slots(begin, end, share, T, G, SHARES)
    # the slots [lower, upper) are seen by all keys
    lower = (gl.max(gl.where(inside, begin, 0), 0) * G + ROWS - 1) // ROWS
    upper = gl.min(gl.where(inside, end, T), 0) * G // ROWS
    begin, end, _ = _intervals(query_begin, query_end, tile, row, C, KEY)
    dk = warpgroup_mma_init(gl.full([KEYS, K], 0.0, gl.float32, of_k))
    dv = warpgroup_mma_init(gl.full([KEYS, V], 0.0, gl.float32, of_v))
    mbarrier.wait(keys_full, 0)
    k, v = as_rows(keys, KEYS, K), as_rows(values, KEYS, V)
    for n in range(last - first):
        i = _nth(n, first, last)
        p, dk, dv = probabilities(k, dk, dv, queries, statistics, full, empty, n, n == 0, K, SCALE, STAGES)
        if (i < lower) | (i >= upper):
            token = (i * ROWS + gl.arange(0, ROWS, layout=ROW)) // G
            p = gl.where((token[None, :] >= begin[:, None]) & (token[None, :] < end[:, None]), p, 0.0)
        dk, dv = add_gradients(p, v, dk, dv, queries, cotangents, statistics, n, K, V, STAGES)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    base = ((share.to(gl.int64) * B + row) * C + tile * KEYS) * H + head
    store_keys(d_key, base, C - tile * KEYS, dk * SCALE, H, K)
    store_keys(d_value, base, C - tile * KEYS, dv, H, V)


@gluon.jit
def backward_key_value(
    query, key, value, d_output, lse, delta, weight, query_begin, query_end, d_key, d_value,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    B: gl.constexpr, SCALE: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """d_key, d_value [SHARES, B, C, H, K|V], as interval.py's `backward_key_value` gives them.

    Grid: TILES * SHARES * H * B.
    """
    keys, values, queries, cotangents, statistics, keys_full, _, full, empty = allocate(
        query, key, value, d_output, K, V, STAGES
    )
    gl.warp_specialize(
        [
            (_multiply, (
                query_begin, query_end, d_key, d_value, keys, values, queries, cotangents, statistics, keys_full,
                full, empty, T, C, H, G, K, V, B, SCALE, TILES, SHARES, STAGES,
            )),
            (_copy, (
                query, d_output, key, value, query_begin, query_end, keys, values, queries, cotangents, keys_full,
                full, empty, T, C, H, G, K, V, TILES, SHARES, STAGES,
            )),
            (_bring, (
                lse, delta, weight, query_begin, query_end, statistics, full, empty,
                T, C, H, G, TILES, SHARES, STAGES,
            )),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
