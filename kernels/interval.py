"""Attention in which every query sees one contiguous interval of keys: the compressed and the sliding branch.

Shapes: query, output [B, T, N, K|V]; key, value [B, C, H, K|V]; N = H * G. Query t of row b sees the keys
[key_begin[b, t], key_end[b, t]); seen from the other side, key c is seen by the queries [query_begin[b, c],
query_end[b, c]). Which keys those are is data: a kernel never assumes that query i stands at key i. An empty interval
gives output 0 and lse -inf.

A row of a tile is one (token, head of the group) pair, row = token * G + head, so the keys of a group are loaded once
for all its heads and no group size wastes a row. Tiles that every row sees whole skip the mask.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, exponent_factor, finish, load_statistics, online_step, scores
from .tiles import accumulate, added, inner, load_keys, load_rows, scaled, store_rows, zeros


@triton.jit
def _program(TILES: tl.constexpr, H: tl.constexpr):
    """(tile, kv head, row of the batch as int64) of this program; the grid is one axis, tiles fastest."""
    program = tl.program_id(0)
    return program % TILES, program // TILES % H, (program // (TILES * H)).to(tl.int64)


@triton.jit
def _query_rows(tile, row, head, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """Query tile number `tile`: its first row's index in [B, T, N]; its rows' offsets from there, tokens, reality."""
    slot = tile * ROWS + tl.arange(0, ROWS)
    token = slot // G
    first = tile * ROWS // G
    base = ((row * T + first) * H + head) * G
    return base, (token - first) * (H * G) + slot % G, token, token < T


@triton.jit
def _whole_tiles(begin, end, inside, first, last, SIDE: tl.constexpr, LIMIT: tl.constexpr):
    """Of the tiles [first, last), those that lie in every interval [begin, end): the tiles [lower, upper)."""
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
def _load_keys(
    tile, key, value, row, head, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KEYS: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Key tile number `tile`: its places [KEYS], keys and values."""
    place = tile * KEYS + tl.arange(0, KEYS)
    keys = load_keys(key, row, tile * KEYS, head, place < C, C, H, K, KEYS, K_PARTS, DESCRIPTORS)  # [KEYS, K]
    values = load_keys(value, row, tile * KEYS, head, place < C, C, H, V, KEYS, V_PARTS, DESCRIPTORS)  # [KEYS, V]
    return place, keys, values


@triton.jit
def forward(
    query, key, value, key_begin, key_end, output, lse,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. Grid: TILES * H * B."""
    tile, head, row = _program(TILES, H)
    # late tokens see most: first
    base, offset, token, inside = _query_rows(TILES - 1 - tile, row, head, T, H, G, ROWS)
    begin = tl.load(key_begin + row * T + token, mask=inside, other=0)  # [ROWS]
    end = tl.load(key_end + row * T + token, mask=inside, other=0)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]

    first = tl.min(tl.where(end > begin, begin, C), 0) // KEYS
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0), KEYS)
    lower, upper = _whole_tiles(begin, end, inside, first, last, KEYS, C)

    factor: tl.constexpr = exponent_factor(SCALE)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    for i in range(lower, upper):
        place, k, v = _load_keys(i, key, value, row, head, C, H, K, V, KEYS, K_PARTS, V_PARTS, DESCRIPTORS)
        score = scores(q, k, SCALE, K_PARTS, PRECISION)  # [ROWS, KEYS]
        peak, total, sums = online_step(score, True, v, peak, total, sums, factor, V_PARTS, PRECISION)
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        place, k, v = _load_keys(j, key, value, row, head, C, H, K, V, KEYS, K_PARTS, V_PARTS, DESCRIPTORS)
        seen = (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])
        score = tl.where(seen, scores(q, k, SCALE, K_PARTS, PRECISION), float("-inf"))
        peak, total, sums = online_step(score, True, v, peak, total, sums, factor, V_PARTS, PRECISION)

    result, result_lse = finish(peak, total, sums, V_PARTS)
    store_rows(output + base * V, offset * V, result, inside, V, V_PARTS)
    tl.store(lse + base + offset, result_lse, mask=inside)


@triton.jit
def backward_query(
    query, key, value, output, d_output, lse, d_lse, weight, before, key_begin, key_end, d_query, delta,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, HAS_D_LSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """d_query [B, T, N, K], and delta float32 [B, T, N], see `load_statistics`.

    The cotangent of the output is weight * d_output. d_lse, with HAS_D_LSE, is that of the lse; before, with
    HAS_BEFORE, is a d_query to add to.
    """
    tile, head, row = _program(TILES, H)
    base, offset, token, inside = _query_rows(TILES - 1 - tile, row, head, T, H, G, ROWS)
    begin = tl.load(key_begin + row * T + token, mask=inside, other=0)  # [ROWS]
    end = tl.load(key_end + row * T + token, mask=inside, other=0)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse, row_delta = load_statistics(output, do, lse, d_lse, delta, base, offset, inside, V, V_PARTS, HAS_D_LSE)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0) * SCALE

    first = tl.min(tl.where(end > begin, begin, C), 0) // KEYS
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0), KEYS)
    lower, upper = _whole_tiles(begin, end, inside, first, last, KEYS, C)

    dq = zeros(ROWS, K_PARTS)  # [ROWS, K]
    for i in range(lower, upper):
        place, k, v = _load_keys(i, key, value, row, head, C, H, K, V, KEYS, K_PARTS, V_PARTS, DESCRIPTORS)
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])  # [ROWS, KEYS]
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        place, k, v = _load_keys(j, key, value, row, head, C, H, K, V, KEYS, K_PARTS, V_PARTS, DESCRIPTORS)
        seen = (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])
        ds = tl.where(seen, p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None]), 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    dq = scaled(dq, row_weight[:, None], K_PARTS)
    if HAS_BEFORE:
        dq = added(dq, load_rows(before + base * K, offset * K, inside, K, K_PARTS), K_PARTS)
    store_rows(d_query + base * K, offset * K, dq, inside, K, K_PARTS)


@triton.jit
def _key_gradients(
    tile, mask_begin, mask_end, k, v, dk, dv, query, d_output, lse, delta, weight, row, head,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds what the rows of query tile number `tile` give to dk [KEYS, K] (still unscaled) and dv [KEYS, V]."""
    base, offset, token, inside = _query_rows(tile, row, head, T, H, G, ROWS)
    if DESCRIPTORS:
        place = [row.to(tl.int32), tile * (ROWS // G), head * G, 0]
        q = (tl.reshape(query.load(place), [ROWS, K]),)
        do = (tl.reshape(d_output.load(place), [ROWS, V]),)
    else:
        q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
        do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse = tl.load(lse + base + offset, mask=inside, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + base + offset, mask=inside, other=0.0)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0)
    p = tl.exp2(inner(k, q, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[None, :])  # [KEYS, ROWS]
    if MASKED:
        p = tl.where((token[None, :] >= mask_begin[:, None]) & (token[None, :] < mask_end[:, None]), p, 0.0)
    p *= row_weight[None, :]
    dv = accumulate(dv, p, do, V_PARTS, PRECISION)
    ds = p * (inner(v, do, V_PARTS, PRECISION) - row_delta[None, :])
    dk = accumulate(dk, ds, q, K_PARTS, PRECISION)
    return dk, dv


@triton.jit
def backward_key_value(
    query, key, value, d_output, lse, delta, weight, query_begin, query_end, d_key, d_value,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """d_key, d_value [SPLITS, B, C, H, K|V], one part per share of the queries. Grid: TILES * SPLITS * H * B.

    The cotangent of the output is weight * d_output; delta is what `backward_query` gives.
    """
    program, head, row = _program(TILES * SPLITS, H)
    split = program % SPLITS
    local = tl.arange(0, KEYS)
    tile = program // SPLITS
    place = tile * KEYS + local
    inside = place < C
    begin = tl.load(query_begin + row * C + place, mask=inside, other=0)  # [KEYS]
    end = tl.load(query_end + row * C + place, mask=inside, other=0)
    base = (row * C + tile * KEYS) * H + head
    k = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
    v = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]

    first = tl.min(tl.where(end > begin, begin, T), 0) * G // ROWS
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0) * G, ROWS)
    share = tl.cdiv(tl.maximum(last - first, 0), SPLITS)
    first += split * share
    last = tl.maximum(tl.minimum(last, first + share), first)
    lower, upper = _whole_tiles(begin * G, end * G, inside, first, last, ROWS, T * G)

    dk = zeros(KEYS, K_PARTS)
    dv = zeros(KEYS, V_PARTS)
    for i in range(lower, upper):
        dk, dv = _key_gradients(
            i, begin, end, k, v, dk, dv, query, d_output, lse, delta, weight, row, head,
            T, H, G, K, V, SCALE, ROWS, False, K_PARTS, V_PARTS, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    for i in range(last - first - (upper - lower)):
        j = _edge_tile(i, first, lower, upper)
        dk, dv = _key_gradients(
            j, begin, end, k, v, dk, dv, query, d_output, lse, delta, weight, row, head,
            T, H, G, K, V, SCALE, ROWS, True, K_PARTS, V_PARTS, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    base += split.to(tl.int64) * (B * C * H)
    store_rows(d_key + base * K, local * (H * K), scaled(dk, SCALE, K_PARTS), inside, K, K_PARTS)
    store_rows(d_value + base * V, local * (H * V), dv, inside, V, V_PARTS)
