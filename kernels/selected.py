"""Attention to chosen blocks of keys: the selected branch.

Shapes: query, output [B, T, N, K|V]; key, value [B, C, H, K|V]; N = H * G. place [B, T] is the query's index in the key row: it sees
the keys up to there. The forward and the query pass go from the query's side: TOKENS tokens x G heads are the rows of a tile, which
walks the union of the tokens' blocks (walk.py). The key pass goes from the block's side: an item is a block and up to CHUNK of the
queries that chose it, so a block that all choose is shared out; what the first item of a block gives goes to `d_key`, what
the others give to `d_key_more`, and `combine` adds them in a fixed order. No atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, finish, online_step
from .tiles import accumulate, added, inner, load_rows, scaled, store_rows, zeros


@triton.jit
def _tile_rows(
    place, row, tile, head, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr
):
    """Where the tile's first row stands in [B, T, N], and the [ROWS] rows' offsets from there, reality, local token, place."""
    slot = tl.arange(0, ROWS)
    local = slot // G
    inside = (slot < TOKENS * G) & (tile * TOKENS + local < T)
    base = ((row * T + tile * TOKENS) * H + head) * G
    row_place = tl.load(place + row * T + tile * TOKENS + local, mask=inside, other=-1)
    return base, local * (H * G) + slot % G, inside, local, row_place


@triton.jit
def _whole_steps(begins, count, row_place, inside, BLOCK: tl.constexpr, SHARES: tl.constexpr, TOKENS: tl.constexpr):
    """Leading steps of a walk in which every row sees every key: for a single token all but those of its own block."""
    steps = 0
    if TOKENS == 1:
        last = tl.load(begins + tl.maximum(count - 1, 0), mask=count > 0, other=0)
        own = last + BLOCK - 1 > tl.max(row_place, 0)
        steps = tl.maximum(count - own.to(tl.int32), 0) * SHARES
    return steps


@triton.jit
def _load_block(
    i, begins, members, key, value, row, head, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KEYS: tl.constexpr, SHARES: tl.constexpr, WHOLE: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr,
):  # fmt: skip
    """Step i of a walk, a block being SHARES steps of KEYS keys: places [KEYS], who chose it, keys and values."""
    chosen_by = tl.load(members + i // SHARES)
    first = tl.load(begins + i // SHARES) + i % SHARES * KEYS
    local = tl.arange(0, KEYS)
    inside = local < (KEYS if WHOLE else C - first)
    base = (row * C + first) * H + head
    keys = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
    values = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]
    return first + local, chosen_by, keys, values


@triton.jit
def _seen(where, chosen_by, local, row_place):
    """[ROWS, KEYS]: the row's token chose this block, and the key is not after it."""
    return (where[None, :] <= row_place[:, None]) & ((chosen_by >> local[:, None]) & 1 == 1)


@triton.jit
def forward(
    query, key, value, place, begins, members, counts, output, lse,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SHARES: tl.constexpr, TILES: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. Grid: TILES * H * B."""
    program = tl.program_id(0)
    tile = program % TILES
    head = program // TILES % H
    row = (program // (TILES * H)).to(tl.int64)
    base, offset, inside, local, row_place = _tile_rows(place, row, tile, head, T, H, G, TOKENS, ROWS)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    unit = (row * H + head) * TILES + tile
    begins += unit * (TOKENS * S)
    members += unit * (TOKENS * S)
    count = tl.load(counts + unit)
    whole = _whole_steps(begins, count, row_place, inside, KEYS * SHARES, SHARES, TOKENS)

    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    for i in range(whole):
        where, chosen_by, k, v = _load_block(
            i, begins, members, key, value, row, head, C, H, K, V, KEYS, SHARES, True, K_PARTS, V_PARTS
        )
        score = inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E)  # [ROWS, KEYS]
        peak, total, sums = online_step(score, v, peak, total, sums, V_PARTS, PRECISION)
    for i in range(whole, count * SHARES):
        where, chosen_by, k, v = _load_block(
            i, begins, members, key, value, row, head, C, H, K, V, KEYS, SHARES, False, K_PARTS, V_PARTS
        )
        score = inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E)
        score = tl.where(_seen(where, chosen_by, local, row_place), score, float("-inf"))
        peak, total, sums = online_step(score, v, peak, total, sums, V_PARTS, PRECISION)
    result, result_lse = finish(peak, total, sums, V_PARTS)
    store_rows(output + base * V, offset * V, result, inside, V, V_PARTS)
    tl.store(lse + base + offset, result_lse, mask=inside)


@triton.jit
def backward_query(
    query, key, value, d_output, lse, delta, weight, place, begins, members, counts, d_query,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SHARES: tl.constexpr, TILES: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_query [B, T, N, K]. The cotangent of the output is weight * d_output; delta is rowsum(d_output * output)."""
    program = tl.program_id(0)
    tile = program % TILES
    head = program // TILES % H
    row = (program // (TILES * H)).to(tl.int64)
    base, offset, inside, local, row_place = _tile_rows(place, row, tile, head, T, H, G, TOKENS, ROWS)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse = tl.load(lse + base + offset, mask=inside, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + base + offset, mask=inside, other=0.0)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0).to(tl.float32) * SCALE
    unit = (row * H + head) * TILES + tile
    begins += unit * (TOKENS * S)
    members += unit * (TOKENS * S)
    count = tl.load(counts + unit)
    whole = _whole_steps(begins, count, row_place, inside, KEYS * SHARES, SHARES, TOKENS)

    dq = zeros(ROWS, K_PARTS)  # [ROWS, K]
    for i in range(whole):
        where, chosen_by, k, v = _load_block(
            i, begins, members, key, value, row, head, C, H, K, V, KEYS, SHARES, True, K_PARTS, V_PARTS
        )
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])  # [ROWS, KEYS]
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    for i in range(whole, count * SHARES):
        where, chosen_by, k, v = _load_block(
            i, begins, members, key, value, row, head, C, H, K, V, KEYS, SHARES, False, K_PARTS, V_PARTS
        )
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[:, None])
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        ds = tl.where(_seen(where, chosen_by, local, row_place), ds, 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
    store_rows(d_query + base * K, offset * K, scaled(dq, row_weight[:, None], K_PARTS), inside, K, K_PARTS)


@triton.jit
def backward_key_value(
    query, key, value, d_output, lse, delta, weight, place, choosers, chooser_first, item_first, item_block, block_begin,
    block_end, block_count, d_key, d_value, d_key_more, d_value_more,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, ITEMS: tl.constexpr, MORE: tl.constexpr, PROGRAMS: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_key, d_value [B, C, H, K|V] and d_key_more, d_value_more float32 [B, H, MORE, BLOCK, K|V].

    choosers: the tokens that chose block m of head h of row b are choosers[chooser_first[b, h, m] : chooser_first[b, h, m + 1]].
    Items item_first[b, h, m] up to item_first[b, h, m + 1] are block m's; item_block [B, H, ITEMS] tells an item's block.
    Grid: (BLOCK // KEYS) * PROGRAMS * H * B; a program does every PROGRAMS-th item.
    """
    shares: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    share = program % shares
    worker = program // shares % PROGRAMS
    head = program // (shares * PROGRAMS) % H
    row = (program // (shares * PROGRAMS * H)).to(tl.int64)
    chooser_first += (row * H + head) * (BLOCKS + 1)
    item_first += (row * H + head) * (BLOCKS + 1)
    item_block += (row * H + head) * ITEMS
    items = tl.load(item_first + tl.load(block_count + row))
    for item in range(worker, items, PROGRAMS):
        block = tl.load(item_block + item)
        chunk = item - tl.load(item_first + block)
        first = tl.load(chooser_first + block) + chunk * CHUNK
        slots = tl.minimum(tl.load(chooser_first + block + 1) - first, CHUNK) * G
        first_key = tl.load(block_begin + row * BLOCKS + block) + share * KEYS
        local = tl.arange(0, KEYS)
        where = first_key + local
        inside = where < tl.load(block_end + row * BLOCKS + block)
        base = (row * C + first_key) * H + head
        k = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
        v = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]
        dk = zeros(KEYS, K_PARTS)
        dv = zeros(KEYS, V_PARTS)
        for begin in range(0, slots, ROWS):
            slot = begin + tl.arange(0, ROWS)
            real = slot < slots
            token = tl.load(choosers + first + slot // G, mask=real, other=0)
            row_offset = (row * T + token) * (H * G) + head * G + slot % G
            q = load_rows(query, row_offset * K, real, K, K_PARTS)  # [ROWS, K]
            do = load_rows(d_output, row_offset * V, real, V, V_PARTS)  # [ROWS, V]
            row_place = tl.load(place + row * T + token, mask=real, other=-1)
            row_lse = tl.load(lse + row_offset, mask=real, other=float("inf")) * LOG2E
            row_delta = tl.load(delta + row_offset, mask=real, other=0.0)
            row_weight = tl.load(weight + row_offset, mask=real, other=0.0).to(tl.float32)
            p = tl.exp2(inner(k, q, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[None, :])  # [KEYS, ROWS]
            p = tl.where(where[:, None] <= row_place[None, :], p * row_weight[None, :], 0.0)
            dv = accumulate(dv, p, do, V_PARTS, PRECISION)
            ds = p * (inner(v, do, V_PARTS, PRECISION) - row_delta[None, :])
            dk = accumulate(dk, ds, q, K_PARTS, PRECISION)
        dk = scaled(dk, SCALE, K_PARTS)
        if chunk == 0:
            store_rows(d_key + base * K, local * (H * K), dk, inside, K, K_PARTS)
            store_rows(d_value + base * V, local * (H * V), dv, inside, V, V_PARTS)
        else:
            # every block before this one has one first item, which has no place among the others
            more = ((row * H + head) * MORE + item - block - 1) * BLOCK + share * KEYS
            store_rows(d_key_more + more * K, local * K, dk, inside, K, K_PARTS)
            store_rows(d_value_more + more * V, local * V, dv, inside, V, V_PARTS)


@triton.jit
def combine(
    d_first, d_more, item_first, block_begin, block_end, block_count, d_total,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """d_total [B, C, H, D] = d_first + the sum over the block's items in d_more [B, H, MORE, BLOCK, D], one after the other."""
    shares: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    worker = program // shares % PROGRAMS
    head = program // (shares * PROGRAMS) % H
    row = (program // (shares * PROGRAMS * H)).to(tl.int64)
    share = program % shares
    local = tl.arange(0, KEYS)
    item_first += (row * H + head) * (BLOCKS + 1)
    for block in range(worker, tl.load(block_count + row), PROGRAMS):
        first_key = tl.load(block_begin + row * BLOCKS + block) + share * KEYS
        inside = first_key + local < tl.load(block_end + row * BLOCKS + block)
        base = ((row * C + first_key) * H + head) * D
        sums = load_rows(d_first + base, local * (H * D), inside, D, PARTS)  # [KEYS, D]
        for i in range(tl.load(item_first + block) - block, tl.load(item_first + block + 1) - block - 1):
            more = (((row * H + head) * MORE + i) * BLOCK + share * KEYS) * D
            sums = added(sums, load_rows(d_more + more, local * D, inside, D, PARTS), PARTS)
        store_rows(d_total + base, local * (H * D), sums, inside, D, PARTS)
