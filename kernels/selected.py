"""Attention to chosen blocks of keys, the selected branch; with WINDOW > 0 also to a short sliding window.

Shapes: query, output [B, T, N, K|V]; key, value [B, C, H, K|V]; N = H * G. place [B, T] is the query's index in the key
row: it sees keys up to there. The passes here go from the query's side: TOKENS tokens x G heads are the rows of a tile,
which goes through the union of the blocks that its tokens want, its walk (block_lists.py). The pass that goes from the
block's side is in selected_keys.py.

A window (keys place - WINDOW + 1 .. place) is a second softmax over scores that the walk has at hand in its last
blocks. Arguments named sliding_* belong to it; with WINDOW 0 they are placeholders.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, exponent_factor, finish_gradient, finish_seen, load_statistics, online_step, scores
from .tiles import accumulate, added, inner, load_keys, load_rows, scaled, store_rows, zeros


@triton.aggregate
class Walk:
    """The walk of a tile, and where its keys are.

    Attributes:
        begins, members: the first keys of its blocks and who wants them, see block_lists.py.
        steps: tiles of keys, of which the first `plain` ones are seen whole by every token that wants them.
        key, value: pointers or descriptors, in batch row `batch`, head `head`.
    """

    begins: tl.tensor
    members: tl.tensor
    steps: tl.tensor
    plain: tl.tensor
    key: tl.core.base_value
    value: tl.core.base_value
    batch: tl.tensor
    head: tl.tensor


@triton.aggregate
class Rows:
    """The rows of a tile of queries.

    Attributes:
        base: where the first row stands in [B, T, N].
        offset: [ROWS] from there.
        inside: [ROWS], whether there is such a row.
        local: [ROWS], the token's number in the tile.
        place: [ROWS], the token's place; -1 where there is none.
    """

    base: tl.tensor
    offset: tl.tensor
    inside: tl.tensor
    local: tl.tensor
    place: tl.tensor


@triton.jit
def _walk(key, value, begins, members, counts, plain_counts, SHAPE: tl.constexpr):
    """The tile of this program, and its walk."""
    program = tl.program_id(0)
    tile = program % SHAPE.TILES
    head = program // SHAPE.TILES % SHAPE.H
    batch = (program // (SHAPE.TILES * SHAPE.H)).to(tl.int64)
    at = (batch * SHAPE.H + head) * SHAPE.TILES + tile
    steps = tl.load(counts + at) * SHAPE.PIECES
    plain = tl.load(plain_counts + at) * SHAPE.PIECES
    entries = at * SHAPE.ENTRIES
    return tile, Walk(begins + entries, members + entries, steps, plain, key, value, batch, head)


@triton.jit
def _tile_rows(place, tile, walk, SHAPE: tl.constexpr):
    """The `Rows` of a tile."""
    row = tl.arange(0, SHAPE.ROWS)
    local = row // SHAPE.G
    inside = (row < SHAPE.TOKENS * SHAPE.G) & (tile * SHAPE.TOKENS + local < SHAPE.T)
    base = ((walk.batch * SHAPE.T + tile * SHAPE.TOKENS) * SHAPE.H + walk.head) * SHAPE.G
    row_place = tl.load(place + walk.batch * SHAPE.T + tile * SHAPE.TOKENS + local, mask=inside, other=-1)
    return Rows(base, local * SHAPE.N + row % SHAPE.G, inside, local, row_place)


@triton.jit
def _sight(sight, rows, SHAPE: tl.constexpr):
    """[ROWS], of sight [B, T, H]: what the rows see."""
    return tl.load(sight + rows.base // SHAPE.G + rows.local * SHAPE.H, mask=rows.inside, other=0)


@triton.jit
def _step(i, walk, SHAPE: tl.constexpr):
    """Step i of a walk: the first key, and who wants the block.

    Where AHEAD, loops take it at the end of the step before: no copy of keys then waits for where they begin.
    """
    inside = i < walk.steps
    first = tl.load(walk.begins + i // SHAPE.PIECES, mask=inside, other=0) + i % SHAPE.PIECES * SHAPE.KEYS
    return first, tl.load(walk.members + i // SHAPE.PIECES, mask=inside, other=0)


@triton.jit
def _load_keys(first, walk, SHAPE: tl.constexpr, PLAIN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """The keys from `first` on: indices [KEYS], keys [KEYS, K] and values [KEYS, V]."""
    H: tl.constexpr = SHAPE.H
    C: tl.constexpr = SHAPE.C
    KEYS: tl.constexpr = SHAPE.KEYS
    where = first + tl.arange(0, KEYS)
    inside = where < (first + KEYS if PLAIN else C)
    k = load_keys(walk.key, walk.batch, first, walk.head, inside, C, H, SHAPE.K, KEYS, SHAPE.K_PARTS, DESCRIPTORS)
    v = load_keys(walk.value, walk.batch, first, walk.head, inside, C, H, SHAPE.V, KEYS, SHAPE.V_PARTS, DESCRIPTORS)
    return where, k, v


@triton.jit
def _wanted(wanted_by, bit):
    """[ROWS]: whether the bit is set that stands for the row's token."""
    return (wanted_by >> bit) & 1 == 1


@triton.jit
def forward(
    query,
    key,
    value,
    place,
    begins,
    members,
    counts,
    plain_counts,
    sight,
    sliding_sight,
    output,
    lse,
    sliding_output,
    sliding_lse,
    SHAPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """output, sliding_output [B, T, N, V]; lse, sliding_lse float32 [B, T, N], natural log. Grid: TILES * H * B.

    sight, sliding_sight int8 [B, T, H] tell what a query sees in a branch, see `finish_seen`.
    """
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    ROWS: tl.constexpr = SHAPE.ROWS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    tile, walk = _walk(key, value, begins, members, counts, plain_counts, SHAPE)
    rows = _tile_rows(place, tile, walk, SHAPE)
    q = load_rows(query + rows.base * K, rows.offset * K, rows.inside, K, SHAPE.K_PARTS)  # [ROWS, K]
    factor: tl.constexpr = exponent_factor(SHAPE.SCALE)

    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    first, wanted_by = _step(0, walk, SHAPE)
    for i in range(walk.plain):
        if not SHAPE.AHEAD:
            first, wanted_by = _step(i, walk, SHAPE)
        where, k, v = _load_keys(first, walk, SHAPE, True, DESCRIPTORS)
        # hidden, not shifted out of sight: the product with a key that is not seen may overflow
        live = _wanted(wanted_by, rows.local)[:, None]
        score = tl.where(live, scores(q, k, SHAPE.SCALE, SHAPE.K_PARTS, PRECISION), float("-inf"))  # [ROWS, KEYS]
        peak, total, sums = online_step(score, v, peak, total, sums, factor, V_PARTS, PRECISION)
        if SHAPE.AHEAD:
            first, wanted_by = _step(i + 1, walk, SHAPE)

    sliding_peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    sliding_total = tl.zeros([ROWS], dtype=tl.float32)
    sliding_sums = zeros(ROWS, V_PARTS)  # [ROWS, V]
    for i in range(walk.plain, walk.steps):
        if not SHAPE.AHEAD:
            first, wanted_by = _step(i, walk, SHAPE)
        where, k, v = _load_keys(first, walk, SHAPE, False, DESCRIPTORS)
        product = scores(q, k, SHAPE.SCALE, SHAPE.K_PARTS, PRECISION)
        seen = where[None, :] <= rows.place[:, None]
        score = tl.where(seen & _wanted(wanted_by, rows.local)[:, None], product, float("-inf"))
        peak, total, sums = online_step(score, v, peak, total, sums, factor, V_PARTS, PRECISION)
        if SHAPE.WINDOW > 0:
            near = seen & _wanted(wanted_by, rows.local + 16)[:, None]
            near = near & (where[None, :] > rows.place[:, None] - SHAPE.WINDOW)
            score = tl.where(near, product, float("-inf"))
            sliding_peak, sliding_total, sliding_sums = online_step(
                score, v, sliding_peak, sliding_total, sliding_sums, factor, V_PARTS, PRECISION
            )
        if SHAPE.AHEAD:
            first, wanted_by = _step(i + 1, walk, SHAPE)

    result, result_lse = finish_seen(peak, total, sums, _sight(sight, rows, SHAPE), V_PARTS)
    store_rows(output + rows.base * V, rows.offset * V, result, rows.inside, V, V_PARTS)
    tl.store(lse + rows.base + rows.offset, result_lse, mask=rows.inside)
    if SHAPE.WINDOW > 0:
        seen = _sight(sliding_sight, rows, SHAPE)
        result, result_lse = finish_seen(sliding_peak, sliding_total, sliding_sums, seen, V_PARTS)
        store_rows(sliding_output + rows.base * V, rows.offset * V, result, rows.inside, V, V_PARTS)
        tl.store(sliding_lse + rows.base + rows.offset, result_lse, mask=rows.inside)


@triton.jit
def backward_query(
    query,
    key,
    value,
    d_output,
    output,
    lse,
    weight,
    sliding_output,
    sliding_lse,
    sliding_weight,
    d_lse,
    before,
    place,
    begins,
    members,
    counts,
    plain_counts,
    d_query,
    delta,
    sliding_delta,
    SHAPE: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """d_query [B, T, N, K], and delta and sliding_delta float32 [B, T, N], see `load_statistics`.

    An output has the cotangent weight * d_output. d_lse, with HAS_D_LSE, is the cotangent of the selected branch's lse;
    before, with HAS_BEFORE, is a d_query to add to. A row that sees nothing, lse -inf, gets 0 whatever its query and
    cotangent hold; one whose lse is NaN gets NaN. Grid: as `forward`.
    """
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    tile, walk = _walk(key, value, begins, members, counts, plain_counts, SHAPE)
    rows = _tile_rows(place, tile, walk, SHAPE)
    base, offset, inside = rows.base, rows.offset, rows.inside
    q = load_rows(query + base * K, offset * K, inside, K, K_PARTS)  # [ROWS, K]
    do = load_rows(d_output + base * V, offset * V, inside, V, V_PARTS)  # [ROWS, V]
    row_lse, row_delta = load_statistics(output, do, lse, d_lse, delta, base, offset, inside, V, V_PARTS, HAS_D_LSE)
    row_weight = tl.load(weight + base + offset, mask=inside, other=0.0)
    # -inf in rows that see nothing, NaN in rows that see something that is not finite
    state = row_lse
    if SHAPE.WINDOW > 0:
        near_lse, near_delta = load_statistics(
            sliding_output, do, sliding_lse, d_lse, sliding_delta, base, offset, inside, V, V_PARTS, False
        )
        near_weight = tl.load(sliding_weight + base + offset, mask=inside, other=0.0)
        row_weight = tl.where(row_lse == float("-inf"), 0.0, row_weight)
        state = tl.where((row_lse == float("-inf")) | (near_lse != near_lse), near_lse, row_lse)

    dq = zeros(SHAPE.ROWS, K_PARTS)  # [ROWS, K]
    first, wanted_by = _step(0, walk, SHAPE)
    for i in range(walk.plain):
        if not SHAPE.AHEAD:
            first, wanted_by = _step(i, walk, SHAPE)
        where, k, v = _load_keys(first, walk, SHAPE, True, DESCRIPTORS)
        p = tl.exp2(inner(q, k, K_PARTS, PRECISION) * (SHAPE.SCALE * LOG2E) - row_lse[:, None])  # [ROWS, KEYS]
        ds = p * (inner(do, v, V_PARTS, PRECISION) - row_delta[:, None])
        ds = tl.where(_wanted(wanted_by, rows.local)[:, None], ds, 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
        if SHAPE.AHEAD:
            first, wanted_by = _step(i + 1, walk, SHAPE)
    dq = scaled(dq, row_weight[:, None], K_PARTS)
    for i in range(walk.plain, walk.steps):
        if not SHAPE.AHEAD:
            first, wanted_by = _step(i, walk, SHAPE)
        where, k, v = _load_keys(first, walk, SHAPE, False, DESCRIPTORS)
        exponent = inner(q, k, K_PARTS, PRECISION) * (SHAPE.SCALE * LOG2E)
        dp = inner(do, v, V_PARTS, PRECISION)
        seen = where[None, :] <= rows.place[:, None]
        ds = tl.exp2(exponent - row_lse[:, None]) * (dp - row_delta[:, None]) * row_weight[:, None]
        ds = tl.where(seen & _wanted(wanted_by, rows.local)[:, None], ds, 0.0)
        if SHAPE.WINDOW > 0:
            near = seen & _wanted(wanted_by, rows.local + 16)[:, None]
            near = near & (where[None, :] > rows.place[:, None] - SHAPE.WINDOW)
            near_ds = tl.exp2(exponent - near_lse[:, None]) * (dp - near_delta[:, None]) * near_weight[:, None]
            ds += tl.where(near, near_ds, 0.0)
        dq = accumulate(dq, ds, k, K_PARTS, PRECISION)
        if SHAPE.AHEAD:
            first, wanted_by = _step(i + 1, walk, SHAPE)
    dq = finish_gradient(scaled(dq, SHAPE.SCALE, K_PARTS), state, K_PARTS)
    if HAS_BEFORE:
        dq = added(dq, load_rows(before + base * K, offset * K, inside, K, K_PARTS), K_PARTS)
    store_rows(d_query + base * K, offset * K, dq, inside, K, K_PARTS)
