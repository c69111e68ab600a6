"""Attention to chosen blocks of keys, the selected branch; with WINDOW > 0 also to a short sliding window.

Shapes: query, output [B, T, N, K|V]; key, value [B, C, H, K|V]; N = H * G. place [B, T] is the query's index in the key
row: it sees keys up to there. The forward and the query pass go from the query's side: TOKENS tokens x G heads are the
rows of a tile, which walks the union of the blocks that its tokens want (walk.py). The key pass goes from the block's
side: an item (`inverse.Items`) is a block and some of the queries that want it, so a block that all want is shared out;
what the first item of a block gives goes to `d_key`, what the others give to `d_key_more`, and `combine` adds them in a
fixed order. No atomics: the same inputs give the same bits.

A window (keys place - WINDOW + 1 .. place) is a second softmax over scores that the walk has at hand in its last
blocks. Arguments named sliding_* belong to it; with WINDOW 0 they are placeholders.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, exponent_factor, finish, load_statistics, online_step, scores
from .tiles import accumulate, added, inner, load_keys, load_rows, scaled, store_rows, zeros


@triton.jit
def _tile_rows(
    place, row, tile, head, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr
):
    """Where the tile's first row stands in [B, T, N], and the rows' offsets from there, reality, local token, place."""
    slot = tl.arange(0, ROWS)
    local = slot // G
    inside = (slot < TOKENS * G) & (tile * TOKENS + local < T)
    base = ((row * T + tile * TOKENS) * H + head) * G
    row_place = tl.load(place + row * T + tile * TOKENS + local, mask=inside, other=-1)
    return base, local * (H * G) + slot % G, inside, local, row_place


@triton.jit
def _step(i, steps, begins, members, SHARES: tl.constexpr, KEYS: tl.constexpr):
    """Step i of a walk, a block being SHARES steps of KEYS keys: the first key, and who wants the block.

    Where AHEAD, loops take it at the end of the step before: no copy of keys then waits for where they begin.
    """
    inside = i < steps
    first = tl.load(begins + i // SHARES, mask=inside, other=0) + i % SHARES * KEYS
    return first, tl.load(members + i // SHARES, mask=inside, other=0)


@triton.jit
def _load_block(
    first, key, value, row, head, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KEYS: tl.constexpr, PLAIN: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The keys from `first` on: places [KEYS], keys and values."""
    where = first + tl.arange(0, KEYS)
    inside = where < (first + KEYS if PLAIN else C)
    keys = load_keys(key, row, first, head, inside, C, H, K, KEYS, K_PARTS, DESCRIPTORS)  # [KEYS, K]
    values = load_keys(value, row, first, head, inside, C, H, V, KEYS, V_PARTS, DESCRIPTORS)  # [KEYS, V]
    return where, keys, values


@triton.jit
def _wanted(wanted_by, bit):
    """[ROWS]: whether the bit is set that stands for the row's token."""
    return (wanted_by >> bit) & 1 == 1


@triton.jit
def forward(
    query, key, value, place, begins, members, counts, plain_counts, output, lse, sliding_output, sliding_lse,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SHARES: tl.constexpr, AHEAD: tl.constexpr, TILES: tl.constexpr, K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """output, sliding_output [B, T, N, V]; lse, sliding_lse float32 [B, T, N], natural log. Grid: TILES * H * B."""
    program = tl.program_id(0)
    tile = program % TILES
    head = program // TILES % H
    row = (program // (TILES * H)).to(tl.int64)
    unit = (row * H + head) * TILES + tile
    steps = tl.load(counts + unit) * SHARES
    plain = tl.load(plain_counts + unit) * SHARES
    begins += unit * (TOKENS * S)
    members += unit * (TOKENS * S)
    base, offset, inside, local, row_place = _tile_rows(place, row, tile, head, T, H, G, TOKENS, ROWS)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    factor: tl.constexpr = exponent_factor(SCALE)

    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    first, wanted_by = _step(0, steps, begins, members, SHARES, KEYS)
    for i in range(plain):
        if not AHEAD:
            first, wanted_by = _step(i, steps, begins, members, SHARES, KEYS)
        where, k, v = _load_block(first, key, value, row, head, C, H, K, V, KEYS, True, K_PARTS, V_PARTS, DESCRIPTORS)
        live = _wanted(wanted_by, local)
        score = scores(q, k, SCALE, K_PARTS, PRECISION)  # [ROWS, KEYS]
        peak, total, sums = online_step(score, live, v, peak, total, sums, factor, V_PARTS, PRECISION)
        if AHEAD:
            first, wanted_by = _step(i + 1, steps, begins, members, SHARES, KEYS)

    sliding_peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    sliding_total = tl.zeros([ROWS], dtype=tl.float32)
    sliding_sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    for i in range(plain, steps):
        if not AHEAD:
            first, wanted_by = _step(i, steps, begins, members, SHARES, KEYS)
        where, k, v = _load_block(first, key, value, row, head, C, H, K, V, KEYS, False, K_PARTS, V_PARTS, DESCRIPTORS)
        live = _wanted(wanted_by, local)
        score = scores(q, k, SCALE, K_PARTS, PRECISION)
        score = tl.where(where[None, :] <= row_place[:, None], score, float("-inf"))
        peak, total, sums = online_step(score, live, v, peak, total, sums, factor, V_PARTS, PRECISION)
        if WINDOW > 0:
            live = _wanted(wanted_by, local + 16)
            score = tl.where(where[None, :] > row_place[:, None] - WINDOW, score, float("-inf"))
            sliding_peak, sliding_total, sliding_sums = online_step(
                score, live, v, sliding_peak, sliding_total, sliding_sums, factor, V_PARTS, PRECISION
            )
        if AHEAD:
            first, wanted_by = _step(i + 1, steps, begins, members, SHARES, KEYS)

    result, result_lse = finish(peak, total, sums, V_PARTS)
    store_rows(output + base * V, offset * V, result, inside, V, V_PARTS)
    tl.store(lse + base + offset, result_lse, mask=inside)
    if WINDOW > 0:
        result, result_lse = finish(sliding_peak, sliding_total, sliding_sums, V_PARTS)
        store_rows(sliding_output + base * V, offset * V, result, inside, V, V_PARTS)
        tl.store(sliding_lse + base + offset, result_lse, mask=inside)


@triton.jit
def backward_query(
    query, key, value, d_output, output, lse, weight, sliding_output, sliding_lse, sliding_weight, d_lse, before,
    place, begins, members, counts, plain_counts, d_query, delta, sliding_delta,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SHARES: tl.constexpr, AHEAD: tl.constexpr, TILES: tl.constexpr, HAS_D_LSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """d_query [B, T, N, K], and delta and sliding_delta float32 [B, T, N], see `load_statistics`.

    An output has the cotangent weight * d_output. d_lse, with HAS_D_LSE, is the cotangent of the selected branch's lse;
    before, with HAS_BEFORE, is a d_query to add to.
    """
    program = tl.program_id(0)
    tile = program % TILES
    head = program // TILES % H
    row = (program // (TILES * H)).to(tl.int64)
    unit = (row * H + head) * TILES + tile
    steps = tl.load(counts + unit) * SHARES
    plain = tl.load(plain_counts + unit) * SHARES
    begins += unit * (TOKENS * S)
    members += unit * (TOKENS * S)
    base, offset, inside, local, row_place = _tile_rows(place, row, tile, head, T, H, G, TOKENS, ROWS)
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse, row_delta = load_statistics(output, do, lse, d_lse, delta, base, offset, inside, V, V_PARTS, HAS_D_LSE)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0)
    if WINDOW > 0:
        near_lse, near_delta = load_statistics(
            sliding_output, do, sliding_lse, d_lse, sliding_delta, base, offset, inside, V, V_PARTS, False
        )
        near_weight = tl.load(sliding_weight + base + offset, mask=inside, other=0.0)

    dq = zeros(ROWS, K_PARTS)  # [ROWS, K]
    first, wanted_by = _step(0, steps, begins, members, SHARES, KEYS)
    for i in range(plain):
        if not AHEAD:
            first, wanted_by = _step(i, steps, begins, members, SHARES, KEYS)
        where, k, v = _load_block(first, key, value, row, head, C, H, K, V, KEYS, True, K_PARTS, V_PARTS, DESCRIPTORS)
        # one number per row hides all of it, which costs less than a mask
        subtrahend = tl.where(_wanted(wanted_by, local), row_lse, float("inf"))
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E) - subtrahend[:, None])  # [ROWS, KEYS]
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
        if AHEAD:
            first, wanted_by = _step(i + 1, steps, begins, members, SHARES, KEYS)
    dq = scaled(dq, row_weight[:, None], K_PARTS)
    for i in range(plain, steps):
        if not AHEAD:
            first, wanted_by = _step(i, steps, begins, members, SHARES, KEYS)
        where, k, v = _load_block(first, key, value, row, head, C, H, K, V, KEYS, False, K_PARTS, V_PARTS, DESCRIPTORS)
        exponent = inner(q, k, K_PARTS, PRECISION) * (SCALE * LOG2E)
        dp = inner(do, v, V_PARTS, PRECISION)
        seen = where[None, :] <= row_place[:, None]
        ds = tl.exp2(exponent - row_lse[:, None]) * (dp - row_delta[:, None]) * row_weight[:, None]
        ds = tl.where(seen & _wanted(wanted_by, local)[:, None], ds, 0.0)
        if WINDOW > 0:
            near = seen & _wanted(wanted_by, local + 16)[:, None] & (where[None, :] > row_place[:, None] - WINDOW)
            near_ds = tl.exp2(exponent - near_lse[:, None]) * (dp - near_delta[:, None]) * near_weight[:, None]
            ds += tl.where(near, near_ds, 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
        if AHEAD:
            first, wanted_by = _step(i + 1, steps, begins, members, SHARES, KEYS)
    dq = scaled(dq, SCALE, K_PARTS)
    if HAS_BEFORE:
        dq = added(dq, load_rows(before + base * K, offset * K, inside, K, K_PARTS), K_PARTS)
    store_rows(d_query + base * K, offset * K, dq, inside, K, K_PARTS)


@triton.jit
def _gathered_statistics(lse, delta, weight, offset, mask):
    """Of the rows at `offset`: the lse in base 2, delta and the weight, float32; a masked row has probability 0."""
    row_lse = tl.load(lse + offset, mask=mask, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + offset, mask=mask, other=0.0)
    return row_lse, row_delta, tl.load(weight + offset, mask=mask, other=0.0)


@triton.jit
def _key_gradients(
    begin, slots, dk, dv, k, v, where, query, d_output, lse, delta, weight,
    sliding_lse, sliding_delta, sliding_weight, place, choosers, head,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, PLAIN: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk [KEYS, K] (still unscaled) and dv [KEYS, V] what the slots from `begin` on give, ROWS of them.

    A slot is a (chooser, head of the group) pair; pointers are to the row of the batch. PLAIN: all slots see all keys,
    and no window reaches here.
    """
    slot = begin + tl.arange(0, ROWS)
    real = slot < slots
    chooser = tl.load(choosers + slot // G, mask=real, other=0)
    token = chooser >> 1
    offset = token * (H * G) + head * G + slot % G
    if T * H * G * max(K, V) >= 2**31:
        offset = offset.to(tl.int64)
    q = load_rows(query, offset * K, real, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output, offset * V, real, V, V_PARTS)  # [ROWS, V]
    row_lse, row_delta, row_weight = _gathered_statistics(lse, delta, weight, offset, real)
    exponent = inner(k, q, K_PARTS, PRECISION) * (SCALE * LOG2E)  # [KEYS, ROWS]
    p = tl.exp2(exponent - row_lse[None, :])
    if PLAIN:
        p *= row_weight[None, :]
        dv = accumulate(dv, p, do, V_PARTS, PRECISION)
        ds = p * (inner(v, do, V_PARTS, PRECISION) - row_delta[None, :])
    else:
        row_place = tl.load(place + token, mask=real, other=-1)
        seen = where[:, None] <= row_place[None, :]
        chosen = seen & (chooser & 1 == 1)[None, :] if WINDOW > 0 else seen
        p = tl.where(chosen, p * row_weight[None, :], 0.0)
        dp = inner(v, do, V_PARTS, PRECISION)
        ds = p * (dp - row_delta[None, :])
        if WINDOW > 0:
            near_lse, near_delta, near_weight = _gathered_statistics(
                sliding_lse, sliding_delta, sliding_weight, offset, real
            )
            near = seen & (where[:, None] > row_place[None, :] - WINDOW)
            near_p = tl.where(near, tl.exp2(exponent - near_lse[None, :]) * near_weight[None, :], 0.0)
            p += near_p
            ds += near_p * (dp - near_delta[None, :])
        dv = accumulate(dv, p, do, V_PARTS, PRECISION)
    dk = accumulate(dk, ds, q, K_PARTS, PRECISION)
    return dk, dv


@triton.jit
def backward_key_value(
    query, key, value, d_output, lse, delta, weight, sliding_lse, sliding_delta, sliding_weight,
    place, choosers, item_block, item_first, item_count, item_rank, item_place, item_total, block_begin, block_end,
    d_key, d_value, d_key_more, d_value_more,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, ITEMS: tl.constexpr, MORE: tl.constexpr, PROGRAMS: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_key, d_value [B, C, H, K|V] and d_key_more, d_value_more float32 [B, H, MORE, BLOCK, K|V].

    The arrays of items are those of `inverse.Items`. Grid: (BLOCK // KEYS) * PROGRAMS * H * B; a program does every
    PROGRAMS-th item.
    """
    shares: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    share = program % shares
    worker = program // shares % PROGRAMS
    head = program // (shares * PROGRAMS) % H
    row = (program // (shares * PROGRAMS * H)).to(tl.int64)
    query += row * T * (H * G * K)
    d_output += row * T * (H * G * V)
    place += row * T
    lse += row * T * (H * G)
    delta += row * T * (H * G)
    weight += row * T * (H * G)
    if WINDOW > 0:
        sliding_lse += row * T * (H * G)
        sliding_delta += row * T * (H * G)
        sliding_weight += row * T * (H * G)
    item_block += (row * H + head) * ITEMS
    item_first += (row * H + head) * ITEMS
    item_count += (row * H + head) * ITEMS
    item_rank += (row * H + head) * ITEMS
    item_place += (row * H + head) * ITEMS
    for item in range(worker, tl.load(item_total + row * H + head), PROGRAMS):
        block = tl.load(item_block + item)
        first = tl.load(item_first + item)
        slots = tl.load(item_count + item) * G
        first_key = tl.load(block_begin + row * BLOCKS + block) + share * KEYS
        local = tl.arange(0, KEYS)
        where = first_key + local
        inside = where < tl.load(block_end + row * BLOCKS + block)
        base = (row * C + first_key) * H + head
        k = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
        v = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]
        dk = zeros(KEYS, K_PARTS)
        dv = zeros(KEYS, V_PARTS)
        # a block's choosers are distinct tokens, ascending from its first: only so many stand in it or near it
        near = tl.maximum(tl.minimum((BLOCK + WINDOW - tl.load(item_rank + item)) * G, slots), 0)
        near_steps = tl.cdiv(near, ROWS)
        for i in range(near_steps):
            dk, dv = _key_gradients(
                i * ROWS, slots, dk, dv, k, v, where, query, d_output, lse, delta, weight,
                sliding_lse, sliding_delta, sliding_weight, place, choosers + first, head,
                T, H, G, K, V, SCALE, WINDOW, ROWS, False, K_PARTS, V_PARTS, PRECISION,
            )  # fmt: skip
        for i in range(near_steps, tl.cdiv(slots, ROWS)):
            dk, dv = _key_gradients(
                i * ROWS, slots, dk, dv, k, v, where, query, d_output, lse, delta, weight,
                sliding_lse, sliding_delta, sliding_weight, place, choosers + first, head,
                T, H, G, K, V, SCALE, WINDOW, ROWS, True, K_PARTS, V_PARTS, PRECISION,
            )  # fmt: skip
        dk = scaled(dk, SCALE, K_PARTS)
        further = tl.load(item_place + item)
        if further < 0:
            store_rows(d_key + base * K, local * (H * K), dk, inside, K, K_PARTS)
            store_rows(d_value + base * V, local * (H * V), dv, inside, V, V_PARTS)
        else:
            more = ((row * H + head) * MORE + further) * BLOCK + share * KEYS
            store_rows(d_key_more + more * K, local * K, dk, inside, K, K_PARTS)
            store_rows(d_value_more + more * V, local * V, dv, inside, V, V_PARTS)


@triton.jit
def combine(
    d_first, d_more, further, block_begin, block_end, block_count, d_total,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """d_total [B, C, H, D] = d_first + the block's further items in d_more [B, H, MORE, BLOCK, D], in order."""
    shares: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    share = program % shares
    worker = program // shares % PROGRAMS
    head = program // (shares * PROGRAMS) % H
    row = (program // (shares * PROGRAMS * H)).to(tl.int64)
    local = tl.arange(0, KEYS)
    further += (row * H + head) * (BLOCKS + 1)
    for block in range(worker, tl.load(block_count + row), PROGRAMS):
        first_key = tl.load(block_begin + row * BLOCKS + block) + share * KEYS
        inside = first_key + local < tl.load(block_end + row * BLOCKS + block)
        base = ((row * C + first_key) * H + head) * D
        sums = load_rows(d_first + base, local * (H * D), inside, D, PARTS)  # [KEYS, D]
        for i in range(tl.load(further + block), tl.load(further + block + 1)):
            more = (((row * H + head) * MORE + i) * BLOCK + share * KEYS) * D
            sums = added(sums, load_rows(d_more + more, local * D, inside, D, PARTS), PARTS)
        store_rows(d_total + base, local * (H * D), sums, inside, D, PARTS)
