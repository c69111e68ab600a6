"""Attention in which every query sees one contiguous interval of keys: the compressed and the sliding branch.

Shapes: query, output [B, T, N, K|V]; key, value [B, C, H, K|V]; N = H * G. Query t of batch row b sees the keys
[key_begin[b, t], key_end[b, t]); seen from the other side, key c is seen by the queries [query_begin[b, c],
query_end[b, c]). Which keys those are is data: a kernel never assumes that query i stands at key i.

What a query does not see does not count, whatever it holds. Keys and values are finite: the caller has replaced those
that are not by zeros, and says in `sight`, int8 [B, T, H], what a query sees: nothing (0; output 0 and lse -inf), what
is finite (1), or also what is not (2; output and lse NaN). Queries and cotangents may hold anything, and reach only
their own row and the keys that it sees.

A query row is a (token, head of the group) pair, number token * G + head, so the keys of a group are loaded once for
all its heads and no group size wastes a row of a tile. Tiles that every row sees whole skip the mask.
"""

import dataclasses

import triton
import triton.language as tl

from .shape import TileShape
from .softmax import LOG2E, exponent_factor, finish_gradient, finish_seen, load_statistics, online_step, scores
from .tiles import accumulate, added, inner, load_keys, load_rows, scaled, store_rows, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryShape(TileShape):
    """The sizes of `forward` and `backward_query`."""

    @property
    def TILES(self) -> int:
        return -(-self.T * self.G // self.ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyShape(TileShape):
    """The sizes of `backward_key_value`.

    Attributes:
        B: batch rows.
        SPLITS: parts into which the queries are cut.
        AHEAD: whether a loop loads the next lse at the end of the step before.
    """

    B: int
    SPLITS: int
    AHEAD: bool

    @property
    def TILES(self) -> int:
        return -(-self.C // self.KEYS)


@triton.jit
def _program(TILES: tl.constexpr, H: tl.constexpr):
    """(tile, kv head, row of the batch as int64) of this program; the grid is one axis, tiles fastest."""
    program = tl.program_id(0)
    return program % TILES, program // TILES % H, (program // (TILES * H)).to(tl.int64)


@triton.aggregate
class QueryRows:
    """The rows of a tile.

    Attributes:
        base: index of the first one in [B, T, N], int64.
        offset: [ROWS], from there.
        token: [ROWS], in the batch row.
        inside: [ROWS], whether there is such a row.
    """

    base: tl.tensor
    offset: tl.tensor
    token: tl.tensor
    inside: tl.tensor


@triton.jit
def _query_rows(tile, row, head, SHAPE: tl.constexpr):
    """The `QueryRows` of tile number `tile`."""
    G: tl.constexpr = SHAPE.G
    ROWS: tl.constexpr = SHAPE.ROWS
    query_row = tile * ROWS + tl.arange(0, ROWS)
    token = query_row // G
    first = tile * ROWS // G
    base = ((row * SHAPE.T + first) * SHAPE.H + head) * G
    return QueryRows(base, (token - first) * SHAPE.N + query_row % G, token, token < SHAPE.T)


@triton.jit
def _whole_tiles(begin, end, inside, first, last, SIDE: tl.constexpr, LIMIT: tl.constexpr):
    """The tiles [lower, upper): those of the tiles [first, last) that lie in every interval [begin, end)."""
    lower = tl.cdiv(tl.max(tl.where(inside, begin, 0), 0), SIDE)
    upper = tl.min(tl.where(inside, end, LIMIT), 0) // SIDE
    lower = tl.minimum(tl.maximum(lower, first), last)
    return lower, tl.maximum(tl.minimum(upper, last), lower)


@triton.jit
def _edge_tile(i, first, lower, upper):
    """The i-th of the tiles around [lower, upper): those from `first` to `lower`, then those from `upper` on."""
    tile = first + i
    return tl.where(tile < lower, tile, tile - lower + upper)


@triton.jit
def _key_tiles(begin, end, inside, SHAPE: tl.constexpr):
    """The tiles [first, last) of keys that any interval touches, and those, [lower, upper), that lie in all of them."""
    C: tl.constexpr = SHAPE.C
    KEYS: tl.constexpr = SHAPE.KEYS
    first = tl.min(tl.where(end > begin, begin, C), 0) // KEYS
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0), KEYS)
    lower, upper = _whole_tiles(begin, end, inside, first, last, KEYS, C)
    return first, last, lower, upper


@triton.jit
def _load_keys(tile, key, value, row, head, SHAPE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Key tile number `tile`: the keys' numbers [KEYS], keys and values."""
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    KEYS: tl.constexpr = SHAPE.KEYS
    first = tile * KEYS
    number = first + tl.arange(0, KEYS)
    k = load_keys(key, row, first, head, number < C, C, H, SHAPE.K, KEYS, SHAPE.K_PARTS, DESCRIPTORS)  # [KEYS, K]
    v = load_keys(value, row, first, head, number < C, C, H, SHAPE.V, KEYS, SHAPE.V_PARTS, DESCRIPTORS)
    return number, k, v


@triton.jit
def forward(query, key, value, key_begin, key_end, sight, output, lse, SHAPE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. Grid: TILES * H * B.

    SHAPE is a `QueryShape`; DESCRIPTORS: whether keys and values are tensor descriptors, not pointers.
    """
    T: tl.constexpr = SHAPE.T
    H: tl.constexpr = SHAPE.H
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    SCALE: tl.constexpr = SHAPE.SCALE
    ROWS: tl.constexpr = SHAPE.ROWS
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    tile, head, row = _program(SHAPE.TILES, H)
    # late tokens see most, so they go first
    rows = _query_rows(SHAPE.TILES - 1 - tile, row, head, SHAPE)
    begin = tl.load(key_begin + row * T + rows.token, mask=rows.inside, other=0)  # [ROWS]
    end = tl.load(key_end + row * T + rows.token, mask=rows.inside, other=0)
    row_sight = tl.load(sight + (row * T + rows.token) * H + head, mask=rows.inside, other=0)
    q = load_rows(query + rows.base * K, rows.offset * K, rows.inside, K, K_PARTS)  # [ROWS, K]

    first, last, lower, upper = _key_tiles(begin, end, rows.inside, SHAPE)
    factor: tl.constexpr = exponent_factor(SCALE)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    for i in range(lower, upper):
        number, k, v = _load_keys(i, key, value, row, head, SHAPE, DESCRIPTORS)
        score = scores(q, k, SCALE, K_PARTS, PRECISION)  # [ROWS, KEYS]
        peak, total, sums = online_step(score, v, peak, total, sums, factor, V_PARTS, PRECISION)
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        number, k, v = _load_keys(j, key, value, row, head, SHAPE, DESCRIPTORS)
        seen = (number[None, :] >= begin[:, None]) & (number[None, :] < end[:, None])
        score = tl.where(seen, scores(q, k, SCALE, K_PARTS, PRECISION), float("-inf"))
        peak, total, sums = online_step(score, v, peak, total, sums, factor, V_PARTS, PRECISION)

    result, result_lse = finish_seen(peak, total, sums, row_sight, V_PARTS)
    store_rows(output + rows.base * V, rows.offset * V, result, rows.inside, V, V_PARTS)
    tl.store(lse + rows.base + rows.offset, result_lse, mask=rows.inside)


@triton.jit
def backward_query(
    query,
    key,
    value,
    output,
    d_output,
    lse,
    d_lse,
    weight,
    before,
    key_begin,
    key_end,
    d_query,
    delta,
    SHAPE: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """d_query [B, T, N, K], and delta float32 [B, T, N], see `load_statistics`.

    The cotangent of the output is weight * d_output. d_lse, with HAS_D_LSE, is that of the lse; before, with
    HAS_BEFORE, is a d_query to add to. A row that sees nothing, lse -inf, gets 0 (or `before`) and delta 0; one whose
    lse is NaN gets NaN. SHAPE and DESCRIPTORS: as in `forward`.
    """
    T: tl.constexpr = SHAPE.T
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    SCALE: tl.constexpr = SHAPE.SCALE
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    tile, head, row = _program(SHAPE.TILES, SHAPE.H)
    rows = _query_rows(SHAPE.TILES - 1 - tile, row, head, SHAPE)
    base, offset, inside = rows.base, rows.offset, rows.inside
    begin = tl.load(key_begin + row * T + rows.token, mask=inside, other=0)  # [ROWS]
    end = tl.load(key_end + row * T + rows.token, mask=inside, other=0)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse, row_delta = load_statistics(output, do, lse, d_lse, delta, base, offset, inside, V, V_PARTS, HAS_D_LSE)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0) * SCALE

    first, last, lower, upper = _key_tiles(begin, end, inside, SHAPE)
    dq = zeros(SHAPE.ROWS, K_PARTS)  # [ROWS, K]
    for i in range(lower, upper):
        number, k, v = _load_keys(i, key, value, row, head, SHAPE, DESCRIPTORS)
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])  # [ROWS, KEYS]
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        number, k, v = _load_keys(j, key, value, row, head, SHAPE, DESCRIPTORS)
        seen = (number[None, :] >= begin[:, None]) & (number[None, :] < end[:, None])
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])
        ds = tl.where(seen, p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None]), 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    dq = finish_gradient(scaled(dq, row_weight[:, None], K_PARTS), row_lse, K_PARTS)
    if HAS_BEFORE:
        dq = added(dq, load_rows(before + base * K, offset * K, inside, K, K_PARTS), K_PARTS)
    store_rows(d_query + base * K, offset * K, dq, inside, K, K_PARTS)


@triton.aggregate
class _Queries:
    """What the pass from the keys' side reads per query row.

    Attributes:
        query, d_output: pointers or descriptors, [B, T, N, K|V].
        lse, delta, weight: pointers, float32 [B, T, N].
        row, head: batch row and kv head.
    """

    query: tl.core.base_value
    d_output: tl.core.base_value
    lse: tl.tensor
    delta: tl.tensor
    weight: tl.tensor
    row: tl.tensor
    head: tl.tensor


@triton.jit
def _row_lse(tile, queries, SHAPE: tl.constexpr):
    """The lse [ROWS] of query tile number `tile` in base 2, inf for dead rows.

    Where AHEAD, loops load it at the end of the step before: copies of queries then need not wait for it.
    """
    rows = _query_rows(tile, queries.row, queries.head, SHAPE)
    row_lse = tl.load(queries.lse + rows.base + rows.offset, mask=rows.inside, other=float("inf"))
    return tl.where(tl.abs(row_lse) < float("inf"), row_lse * LOG2E, float("inf"))


@triton.jit
def _key_gradients(
    tile,
    row_lse,
    begin,
    end,
    k,
    v,
    dk,
    dv,
    queries,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds what the rows of query tile number `tile` give to dk [KEYS, K] (still unscaled) and dv [KEYS, V].

    MASKED: whether a key may not be seen by a row: keys are seen by the queries [begin, end) [KEYS].
    """
    G: tl.constexpr = SHAPE.G
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    ROWS: tl.constexpr = SHAPE.ROWS
    rows = _query_rows(tile, queries.row, queries.head, SHAPE)
    live = row_lse < float("inf")
    if DESCRIPTORS:
        where = [queries.row.to(tl.int32), tile * (ROWS // G), queries.head * G, 0]
        q = (tl.where(live[:, None], tl.reshape(queries.query.load(where), [ROWS, K]), 0.0),)
        do = (tl.where(live[:, None], tl.reshape(queries.d_output.load(where), [ROWS, V]), 0.0),)
    else:
        q = load_rows(queries.query + rows.base * K, rows.offset * K, live, K, SHAPE.K_PARTS)  # [ROWS, K]
        do = load_rows(queries.d_output + rows.base * V, rows.offset * V, live, V, SHAPE.V_PARTS)  # [ROWS, V]
    row_delta = tl.where(live, tl.load(queries.delta + rows.base + rows.offset, mask=rows.inside, other=0.0), 0.0)
    row_weight = tl.where(live, tl.load(queries.weight + rows.base + rows.offset, mask=rows.inside, other=0.0), 0.0)
    score = inner(k, q, SHAPE.K_PARTS, SHAPE.PRECISION)  # [KEYS, ROWS]
    p = tl.exp2(score * (SHAPE.SCALE * LOG2E) - row_lse[None, :]) * row_weight[None, :]
    if MASKED:
        seen = (rows.token[None, :] >= begin[:, None]) & (rows.token[None, :] < end[:, None])
        p = tl.where(seen, p, 0.0)
    dv = accumulate(dv, p, do, SHAPE.V_PARTS, SHAPE.PRECISION)
    ds = p * (inner(v, do, SHAPE.V_PARTS, SHAPE.PRECISION) - row_delta[None, :])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)  # the product with a value that is not seen may overflow
    dk = accumulate(dk, ds, q, SHAPE.K_PARTS, SHAPE.PRECISION)
    return dk, dv


@triton.jit
def backward_key_value(
    query,
    key,
    value,
    d_output,
    lse,
    delta,
    weight,
    query_begin,
    query_end,
    d_key,
    d_value,
    SHAPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """d_key, d_value [SPLITS, B, C, H, K|V], to be summed. Grid: TILES * SPLITS * H * B.

    Each split has a part of the queries. The cotangent of the output is weight * d_output; delta is what
    `backward_query` gives. Dead rows, whose lse is not finite, count for nothing, whatever else they hold.
    """
    T: tl.constexpr = SHAPE.T
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    G: tl.constexpr = SHAPE.G
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    ROWS: tl.constexpr = SHAPE.ROWS
    KEYS: tl.constexpr = SHAPE.KEYS
    SPLITS: tl.constexpr = SHAPE.SPLITS
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    program, head, row = _program(SHAPE.TILES * SPLITS, H)
    queries = _Queries(query, d_output, lse, delta, weight, row, head)
    split = program % SPLITS
    local = tl.arange(0, KEYS)
    tile = program // SPLITS
    number = tile * KEYS + local
    inside = number < C
    begin = tl.load(query_begin + row * C + number, mask=inside, other=0)  # [KEYS]
    end = tl.load(query_end + row * C + number, mask=inside, other=0)
    base = (row * C + tile * KEYS) * H + head
    k = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
    v = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]

    first = tl.min(tl.where(end > begin, begin, T), 0) * G // ROWS
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0) * G, ROWS)
    tiles = tl.cdiv(tl.maximum(last - first, 0), SPLITS)
    first += split * tiles
    last = tl.maximum(tl.minimum(last, first + tiles), first)
    lower, upper = _whole_tiles(begin * G, end * G, inside, first, last, ROWS, T * G)

    dk = zeros(KEYS, K_PARTS)
    dv = zeros(KEYS, V_PARTS)
    row_lse = _row_lse(lower, queries, SHAPE)
    for i in range(lower, upper):
        if not SHAPE.AHEAD:
            row_lse = _row_lse(i, queries, SHAPE)
        dk, dv = _key_gradients(i, row_lse, begin, end, k, v, dk, dv, queries, SHAPE, False, DESCRIPTORS)
        if SHAPE.AHEAD:
            row_lse = _row_lse(i + 1, queries, SHAPE)
    row_lse = _row_lse(_edge_tile(0, first, lower, upper), queries, SHAPE)
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        if not SHAPE.AHEAD:
            row_lse = _row_lse(j, queries, SHAPE)
        dk, dv = _key_gradients(j, row_lse, begin, end, k, v, dk, dv, queries, SHAPE, True, DESCRIPTORS)
        if SHAPE.AHEAD:
            row_lse = _row_lse(_edge_tile(i + 1, first, lower, upper), queries, SHAPE)
    base += split.to(tl.int64) * (SHAPE.B * C * H)
    store_rows(d_key + base * K, local * (H * K), scaled(dk, SHAPE.SCALE, K_PARTS), inside, K, K_PARTS)
    store_rows(d_value + base * V, local * (H * V), dv, inside, V, V_PARTS)
