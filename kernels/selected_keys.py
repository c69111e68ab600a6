"""The selected branch's pass from the side of the blocks of keys; see selected.py for shapes and the window.

An item (`inverse.Items`) is a block and some of the queries that want it, so several items share a block that all want.
The first item of a block writes to `d_key`, the others write to `d_key_more`, and `combine` adds them in a fixed order.
No atomics: the same inputs give the same bits.
"""

import dataclasses

import triton
import triton.language as tl

from .softmax import LOG2E
from .tiles import accumulate, added, inner, load_rows, scaled, store_rows, where, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineShape:
    """The sizes of `combine`.

    Attributes:
        C: keys of a batch row.
        H: kv heads.
        D: width of keys or of values.
        PARTS: powers of two into which it is cut, see tiles.py.
        BLOCK: keys of a block.
        KEYS: keys of a tile; a block is PIECES such tiles.
        BLOCKS: most blocks of a batch row.
        MORE: most items of a batch row and head that are not a block's first.
    """

    C: int
    H: int
    D: int
    PARTS: tuple[int, ...]
    BLOCK: int
    KEYS: int
    BLOCKS: int
    MORE: int

    @property
    def PIECES(self) -> int:
        return self.BLOCK // self.KEYS

    @property
    def PROGRAMS(self) -> int:
        return -(-self.C // self.BLOCK)


@triton.aggregate
class Statistics:
    """Pointers to a branch's lse, delta and weight of one batch row: float32 [T, N]."""

    lse: tl.tensor
    delta: tl.tensor
    weight: tl.tensor


@triton.aggregate
class Queries:
    """Pointers to the queries of one batch row, their cotangents, places and statistics of both branches."""

    query: tl.tensor
    d_output: tl.tensor
    place: tl.tensor
    selected: Statistics
    sliding: Statistics


@triton.aggregate
class Items:
    """Pointers to the arrays of `inverse.Items` that all who go through items need, and to the blocks' first keys."""

    choosers: tl.tensor
    block: tl.tensor
    first: tl.tensor
    count: tl.tensor
    total: tl.tensor
    block_begin: tl.tensor


@triton.aggregate
class Ends:
    """Pointers to what only multiplying needs.

    Attributes:
        rank, more: of an item, see `inverse.Items`.
        block_end: behind the last key of a block.
        near: queries that stand in a block or so near behind it that their window may reach it.
    """

    rank: tl.tensor
    more: tl.tensor
    block_end: tl.tensor
    near: tl.tensor


@triton.jit
def _gathered(statistics, offset, mask):
    """The lse in base 2 (inf where masked or dead), delta and weight (0 there) of the rows at `offset`, float32."""
    row_lse = tl.load(statistics.lse + offset, mask=mask, other=float("inf"))
    row_delta = tl.load(statistics.delta + offset, mask=mask, other=0.0)
    row_weight = tl.load(statistics.weight + offset, mask=mask, other=0.0)
    live = tl.abs(row_lse) < float("inf")
    row_lse = tl.where(live, row_lse * LOG2E, float("inf"))
    return row_lse, tl.where(live, row_delta, 0.0), tl.where(live, row_weight, 0.0)


@triton.jit
def _key_gradients(
    begin, count, dk, dv, k, v, index, queries, choosers, head, SHAPE: tl.constexpr, PLAIN: tl.constexpr
):
    """Adds to dk [KEYS, K] (still unscaled) and dv [KEYS, V] what ROWS rows of an item give, from row `begin` on.

    The item has `count` rows, (chooser, head of the group) pairs. PLAIN: all rows see all keys, and no window reaches
    here. A dead row counts as zeros.
    """
    G: tl.constexpr = SHAPE.G
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    row = begin + tl.arange(0, SHAPE.ROWS)
    real = row < count
    chooser = tl.load(choosers + row // G, mask=real, other=0)
    token = chooser >> 1
    offset = token * SHAPE.N + head * G + row % G
    if SHAPE.T * SHAPE.N * max(K, V) >= 2**31:
        offset = offset.to(tl.int64)
    row_lse, row_delta, row_weight = _gathered(queries.selected, offset, real)
    alive = row_lse < float("inf")
    if SHAPE.WINDOW > 0 and not PLAIN:
        near_lse = tl.load(queries.sliding.lse + offset, mask=real, other=float("inf"))
        alive = alive | (tl.abs(near_lse) < float("inf"))
        # the mask of these loads would take more registers than there are
        q = where(~alive, 0.0, load_rows(queries.query, offset * K, real, K, K_PARTS), K_PARTS)  # [ROWS, K]
        do = where(~alive, 0.0, load_rows(queries.d_output, offset * V, real, V, V_PARTS), V_PARTS)  # [ROWS, V]
    else:
        q = load_rows(queries.query, offset * K, alive, K, K_PARTS)
        do = load_rows(queries.d_output, offset * V, alive, V, V_PARTS)
    exponent = inner(k, q, K_PARTS, PRECISION) * (SHAPE.SCALE * LOG2E)  # [KEYS, ROWS]
    p = tl.exp2(exponent - row_lse[None, :])
    if PLAIN:
        p *= row_weight[None, :]
        dv = accumulate(dv, p, do, V_PARTS, PRECISION)
        ds = p * (inner(v, do, V_PARTS, PRECISION) - row_delta[None, :])
    else:
        row_place = tl.load(queries.place + token, mask=real, other=-1)
        seen = index[:, None] <= row_place[None, :]
        chosen = seen & (chooser & 1 == 1)[None, :] if SHAPE.WINDOW > 0 else seen
        p = tl.where(chosen, p * row_weight[None, :], 0.0)
        dp = inner(v, do, V_PARTS, PRECISION)
        ds = tl.where(chosen, p * (dp - row_delta[None, :]), 0.0)  # the product with an unseen value may overflow
        if SHAPE.WINDOW > 0:
            near_lse, near_delta, near_weight = _gathered(queries.sliding, offset, real)
            near = seen & (index[:, None] > row_place[None, :] - SHAPE.WINDOW)
            near_p = tl.where(near, tl.exp2(exponent - near_lse[None, :]) * near_weight[None, :], 0.0)
            p += near_p
            ds += tl.where(near, near_p * (dp - near_delta[None, :]), 0.0)
        dv = accumulate(dv, p, do, V_PARTS, PRECISION)
    dk = accumulate(dk, ds, q, K_PARTS, PRECISION)
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
    sliding_lse,
    sliding_delta,
    sliding_weight,
    place,
    choosers,
    item_block,
    item_first,
    item_count,
    item_rank,
    item_more,
    item_total,
    block_begin,
    block_end,
    block_near,
    d_key,
    d_value,
    d_key_more,
    d_value_more,
    SHAPE: tl.constexpr,
):
    """d_key, d_value [B, C, H, K|V] and d_key_more, d_value_more float32 [B, H, MORE, BLOCK, K|V].

    The arrays of items are those of `inverse.Items`. A dead row, one whose lse in a branch is not
    finite, since it sees nothing there or something that is not finite, may hold anything.
    block_near int32 [B, BLOCKS]: how many queries stand in a block, or behind it so near that their window may reach
    it; queries are sorted by place. Grid: PIECES * PROGRAMS * H * B; a program does one piece of every
    PROGRAMS-th item's block.
    """
    G: tl.constexpr = SHAPE.G
    H: tl.constexpr = SHAPE.H
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    PIECES: tl.constexpr = SHAPE.PIECES
    program = tl.program_id(0)
    piece = program % PIECES
    worker = program // PIECES % SHAPE.PROGRAMS
    head = program // (PIECES * SHAPE.PROGRAMS) % H
    batch = (program // (PIECES * SHAPE.PROGRAMS * H)).to(tl.int64)
    query += batch * SHAPE.T * (SHAPE.N * K)
    d_output += batch * SHAPE.T * (SHAPE.N * V)
    place += batch * SHAPE.T
    rows = batch * SHAPE.T * SHAPE.N
    selected = Statistics(lse + rows, delta + rows, weight + rows)
    sliding = selected
    if SHAPE.WINDOW > 0:
        sliding = Statistics(sliding_lse + rows, sliding_delta + rows, sliding_weight + rows)
    queries = Queries(query, d_output, place, selected, sliding)
    at = (batch * H + head) * SHAPE.ITEMS
    items = Items(choosers, item_block + at, item_first + at, item_count + at, item_total, block_begin)
    ends = Ends(item_rank + at, item_more + at, block_end, block_near)
    for item in range(worker, tl.load(items.total + batch * H + head), SHAPE.PROGRAMS):
        block = tl.load(items.block + item)
        first = tl.load(items.first + item)
        count = tl.load(items.count + item) * G
        first_key = tl.load(items.block_begin + batch * SHAPE.BLOCKS + block) + piece * SHAPE.KEYS
        local = tl.arange(0, SHAPE.KEYS)
        index = first_key + local
        inside = index < tl.load(ends.block_end + batch * SHAPE.BLOCKS + block)
        base = (batch * SHAPE.C + first_key) * H + head
        k = load_rows(key + base * K, local * (H * K), inside, K, K_PARTS)  # [KEYS, K]
        v = load_rows(value + base * V, local * (H * V), inside, V, V_PARTS)  # [KEYS, V]
        dk = zeros(SHAPE.KEYS, K_PARTS)
        dv = zeros(SHAPE.KEYS, V_PARTS)
        # a block's choosers are in the order of their places: only the first ones stand in it or near it
        near = tl.load(ends.near + batch * SHAPE.BLOCKS + block) - tl.load(ends.rank + item)
        near = tl.maximum(tl.minimum(near * G, count), 0)
        near_steps = tl.cdiv(near, SHAPE.ROWS)
        mine = items.choosers + first
        for i in range(near_steps):
            begin = i * SHAPE.ROWS
            dk, dv = _key_gradients(begin, count, dk, dv, k, v, index, queries, mine, head, SHAPE, False)
        for i in range(near_steps, tl.cdiv(count, SHAPE.ROWS)):
            begin = i * SHAPE.ROWS
            dk, dv = _key_gradients(begin, count, dk, dv, k, v, index, queries, mine, head, SHAPE, True)
        dk = scaled(dk, SHAPE.SCALE, K_PARTS)
        number = tl.load(ends.more + item)
        if number < 0:
            store_rows(d_key + base * K, local * (H * K), dk, inside, K, K_PARTS)
            store_rows(d_value + base * V, local * (H * V), dv, inside, V, V_PARTS)
        else:
            more = ((batch * H + head) * SHAPE.MORE + number) * SHAPE.BLOCK + piece * SHAPE.KEYS
            store_rows(d_key_more + more * K, local * K, dk, inside, K, K_PARTS)
            store_rows(d_value_more + more * V, local * V, dv, inside, V, V_PARTS)


@triton.jit
def combine(d_first, d_more, further, block_begin, block_end, block_count, d_total, SHAPE: tl.constexpr):
    """d_total [B, C, H, D] = d_first + the block's further items in d_more [B, H, MORE, BLOCK, D], in order.

    SHAPE is a `CombineShape`. Grid: PIECES * PROGRAMS * H * B.
    """
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    D: tl.constexpr = SHAPE.D
    PARTS: tl.constexpr = SHAPE.PARTS
    PIECES: tl.constexpr = SHAPE.PIECES
    PROGRAMS: tl.constexpr = SHAPE.PROGRAMS
    program = tl.program_id(0)
    piece = program % PIECES
    worker = program // PIECES % PROGRAMS
    head = program // (PIECES * PROGRAMS) % H
    batch = (program // (PIECES * PROGRAMS * H)).to(tl.int64)
    local = tl.arange(0, SHAPE.KEYS)
    further += (batch * H + head) * (SHAPE.BLOCKS + 1)
    for block in range(worker, tl.load(block_count + batch), PROGRAMS):
        first_key = tl.load(block_begin + batch * SHAPE.BLOCKS + block) + piece * SHAPE.KEYS
        inside = first_key + local < tl.load(block_end + batch * SHAPE.BLOCKS + block)
        base = ((batch * C + first_key) * H + head) * D
        sums = load_rows(d_first + base, local * (H * D), inside, D, PARTS)  # [KEYS, D]
        for i in range(tl.load(further + block), tl.load(further + block + 1)):
            more = (((batch * H + head) * SHAPE.MORE + i) * SHAPE.BLOCK + piece * SHAPE.KEYS) * D
            sums = added(sums, load_rows(d_more + more, local * D, inside, D, PARTS), PARTS)
        store_rows(d_total + base, local * (H * D), sums, inside, D, PARTS)
