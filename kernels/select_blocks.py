"""Online top-k selection: the blocks that each query attends to, from scores that never leave the chip.

Shapes: query [B, T, N, K]; compressed_key [B, C, H, K]; lse [B, T, N]; N = H * G. The place in the key row at which a
query's segment begins tells its segment, and query t of batch row b sees the windows in the slots
[key_begin[b, t], key_end[b, t]): where a query stands is data, in any order, and several may stand at one place; T is
only how many there are. Windows and blocks count from the segment's first, so that blocks line up.

A tile is TOKENS consecutive tokens by the HEADS (G, padded) of one group. It goes through the windows of its segment,
sums their probabilities over the group, then over each block, and keeps a list of the best blocks per token. A list
entry is a block and its rank: the bits of its importance, which as integers order as the importances do. Forced blocks
enter the list first, so that only blocks before them are scored: candidates for what room is left. An importance
that is not a number counts as 0, whatever its bits are; no other token of the tile is concerned.
"""

import dataclasses

import triton
import triton.language as tl

from .shape import Shape, TileShape
from .softmax import LOG2E
from .tiles import inner, load_keys, load_rows

KEPT = tl.constexpr(0x7FFFFFFF)  # rank of an entry that nothing displaces
LANES = tl.constexpr(32)  # candidates lie across a warp's lanes, tokens across warps: rounds need no shared memory
NONE = tl.constexpr(0x40000000)  # blocks from here on stand for an empty place in the list
NOWHERE = tl.constexpr(0x7FFFFFFF)  # where no segment begins


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionShape(Shape):
    """Sizes of the keys' windows and blocks, and by what rule blocks are chosen.

    Attributes:
        S: blocks that a query takes at most.
        BLOCK_STRIDES, WINDOW_STRIDES: strides in a block and in a window.
        INIT, LOCAL: first and last blocks of a segment that are always taken.
        LIST: entries of a token's list.
    """

    S: int
    BLOCK_STRIDES: int
    WINDOW_STRIDES: int
    INIT: int
    LOCAL: int
    LIST: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionTileShape(SelectionShape, TileShape):
    """What the kernel here has beside that: a tile of TOKENS * HEADS query rows.

    Attributes:
        TOKENS, HEADS: tokens and heads of the group, padded to powers of two.
        PARTS: how many times a chunk has KEYS windows, which are multiplied at once.
    """

    TOKENS: int
    HEADS: int
    PARTS: int

    @property
    def TILES(self) -> int:
        return -(-self.T // self.TOKENS)


@triton.aggregate
class Queries:
    """The queries of a tile, all int32 [TOKENS].

    Attributes:
        room: blocks to take.
        start: place in the key row at which the segment begins.
        own: the block of the segment that the query stands in.
        begin, seen: slot of the first window that it sees, and how many windows it sees.
    """

    room: tl.tensor
    start: tl.tensor
    own: tl.tensor
    begin: tl.tensor
    seen: tl.tensor


@triton.aggregate
class Segment:
    """What a tile goes through of one segment.

    Attributes:
        first: slot of the segment's first window.
        windows: most windows that one of its queries sees.
        stop: the block before which all candidates of its queries are.
    """

    first: tl.tensor
    windows: tl.tensor
    stop: tl.tensor


@triton.jit
def _load_queries(count, segment_start, own_block, key_begin, key_end, index, head, inside, SHAPE: tl.constexpr):
    """The `Queries` at index [TOKENS] of [B * T]."""
    room = tl.load(count + index * SHAPE.H + head, mask=inside, other=0)
    start = tl.load(segment_start + index, mask=inside, other=0)
    own = tl.load(own_block + index, mask=inside, other=0)
    begin = tl.load(key_begin + index, mask=inside, other=0)
    seen = tl.load(key_end + index, mask=inside, other=0) - begin
    return Queries(room, start, own, begin, seen)


@triton.jit
def _group_probability(q, k, row_lse, SHAPE: tl.constexpr):
    """[TOKENS, KEYS]: the probability of each window, summed over the heads of the group."""
    # keys first: a group's heads then lie along a thread's registers, where the sum is cheap
    score = inner(k, q, SHAPE.K_PARTS, SHAPE.PRECISION)  # [KEYS, TOKENS * HEADS]
    p = tl.exp2(score * (SHAPE.SCALE * LOG2E) - row_lse[None, :])
    return tl.trans(tl.sum(tl.reshape(p, [SHAPE.KEYS, SHAPE.TOKENS, SHAPE.HEADS]), 2))


@triton.jit
def _over_blocks(p, SHAPE: tl.constexpr):
    """What the windows of p [TOKENS, KEYS] give to their own blocks and to the next ones, each [TOKENS, blocks].

    The i-th window of a block shares min(WINDOW_STRIDES, BLOCK_STRIDES - i) strides with it, the rest with the next.
    """
    STRIDES: tl.constexpr = SHAPE.BLOCK_STRIDES
    i = tl.arange(0, STRIDES)[None, None, :]
    windows = tl.reshape(p, [SHAPE.TOKENS, SHAPE.KEYS // STRIDES, STRIDES])
    own = tl.sum(windows * tl.minimum(STRIDES - i, SHAPE.WINDOW_STRIDES).to(tl.float32), 2)
    if SHAPE.WINDOW_STRIDES > 1:
        return own, tl.sum(windows * tl.maximum(i + (SHAPE.WINDOW_STRIDES - STRIDES), 0).to(tl.float32), 2)
    else:
        return own, own


@triton.jit
def _importance(
    key, q, row_lse, chunk, segment, seen, carry, row, head, SHAPE: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[TOKENS, BLOCKS]: the importance of each block of a chunk, and what its last block gives to the next chunk.

    carry [TOKENS]: what the chunk before gives to the first block of this one.
    """
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    KEYS: tl.constexpr = SHAPE.KEYS
    STRIDES: tl.constexpr = SHAPE.BLOCK_STRIDES
    CHUNK: tl.constexpr = SHAPE.PARTS * KEYS
    BLOCKS: tl.constexpr = CHUNK // STRIDES
    importance = tl.zeros([SHAPE.TOKENS, SHAPE.PARTS, KEYS // STRIDES], dtype=tl.float32)
    spill = tl.zeros([SHAPE.TOKENS, SHAPE.PARTS, KEYS // STRIDES], dtype=tl.float32)
    for part in range(tl.minimum(SHAPE.PARTS, tl.cdiv(segment.stop * STRIDES - chunk * CHUNK, KEYS))):
        window = (chunk * SHAPE.PARTS + part) * KEYS + tl.arange(0, KEYS)
        slot = segment.first + (chunk * SHAPE.PARTS + part) * KEYS
        there = window < segment.windows
        k = load_keys(key, row, slot, head, there, C, H, SHAPE.K, KEYS, SHAPE.K_PARTS, DESCRIPTORS)
        p = _group_probability(q, k, row_lse, SHAPE)
        p = tl.where(window[None, :] < seen[:, None], p, 0.0)
        here = tl.arange(0, SHAPE.PARTS)[None, :, None] == part
        if STRIDES == 1:
            importance = tl.where(here, p[:, None, :], importance)
        else:
            to_own, to_next = _over_blocks(p, SHAPE)
            importance = tl.where(here, to_own[:, None, :], importance)
            if SHAPE.WINDOW_STRIDES > 1:
                spill = tl.where(here, to_next[:, None, :], spill)

    importance = tl.reshape(importance, [SHAPE.TOKENS, BLOCKS])
    if SHAPE.WINDOW_STRIDES > 1:
        spill = tl.reshape(spill, [SHAPE.TOKENS, BLOCKS])
        column = tl.arange(0, BLOCKS)[None, :]
        before = tl.broadcast_to(tl.maximum(column - 1, 0), [SHAPE.TOKENS, BLOCKS])
        importance += tl.where(column == 0, carry[:, None], tl.gather(spill, before, 1))
        carry = tl.sum(tl.where(column == BLOCKS - 1, spill, 0.0), 1)
    return importance, carry


@triton.jit
def _largest(x):
    """[M, TOKENS, LANES] -> [1, TOKENS, 1]."""
    return tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _smallest(x):
    """[M, TOKENS, LANES] -> [1, TOKENS, 1]."""
    return tl.min(tl.min(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _compare(rank, list_rank, TOKENS: tl.constexpr):
    """The best candidate and the worst in the list, [1, TOKENS, LANES], and whether any token's candidate is better."""
    # spread over the lanes: what the rounds carry on then needs no exchange between threads
    best = tl.broadcast_to(_largest(rank), [1, TOKENS, LANES])
    worst = tl.broadcast_to(_smallest(list_rank), [1, TOKENS, LANES])
    return best, worst, tl.max(tl.ravel((best > worst).to(tl.int32)), 0)


@triton.jit
def _insert(rank, block, list_rank, list_block, TOKENS: tl.constexpr):
    """The list after a chunk of candidates, all [M, TOKENS, LANES]: `rank` (negative: none) of `block` [M, 1, LANES].

    The smaller block of equal ranks stays; chunks come in ascending order.
    """
    best, worst, more = _compare(rank, list_rank, TOKENS)
    while more > 0:
        chosen = _smallest(tl.where(rank == best, block, NONE))
        evicted = _largest(tl.where(list_rank == worst, list_block, -1))
        replaced = (best > worst) & (list_block == evicted)
        list_rank = tl.where(replaced, best, list_rank)
        list_block = tl.where(replaced, chosen, list_block)
        rank = tl.where(block == chosen, -1, rank)
        best, worst, more = _compare(rank, list_rank, TOKENS)
    return list_rank, list_block


@triton.jit
def _start_lists(queries, entry, SHAPE: tl.constexpr):
    """Ranks and blocks [LIST // LANES, TOKENS, LANES] of lists that hold the forced blocks, or all where all fit.

    Also the block before which candidates are [TOKENS], from INIT on. entry: 0 to LIST as [LIST // LANES, 1, LANES].
    """
    room, own = queries.room, queries.own
    near = tl.minimum(own + 1, SHAPE.LOCAL)
    forced = near + tl.minimum(own + 1 - near, SHAPE.INIT)
    all_fit = own < room
    fixed = entry < tl.where(all_fit, own + 1, tl.minimum(forced, room))[None, :, None]
    by_priority = tl.where(entry < near[None, :, None], own[None, :, None] - entry, entry - near[None, :, None])
    list_block = tl.where(fixed, tl.where(all_fit[None, :, None], entry, by_priority), NONE + entry)
    list_rank = tl.where(fixed | (entry >= room[None, :, None]), KEPT, -1)
    return list_rank, list_block, tl.where(all_fit | (forced >= room), 0, own + 1 - SHAPE.LOCAL)


@triton.jit
def _ascending(list_block, entry, queries, SHAPE: tl.constexpr):
    """[LIST // LANES, TOKENS, LANES]: the blocks of the lists in ascending order, then -1."""
    chosen = tl.full([SHAPE.LIST // LANES, SHAPE.TOKENS, LANES], -1, dtype=tl.int32)
    for i in range(tl.max(tl.minimum(queries.room, queries.own + 1), 0)):
        smallest = _smallest(list_block)
        chosen = tl.where((entry == i) & (smallest < NONE), smallest, chosen)
        list_block = tl.where(list_block == smallest, KEPT, list_block)
    return chosen


@triton.jit
def select(
    query,
    compressed_key,
    lse,
    count,
    segment_start,
    own_block,
    key_begin,
    key_end,
    block_indices,
    SHAPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """block_indices int32 [B, T, H, S], ascending, then -1; count [B, T, H] is how many to choose. Grid: H * TILES * B.

    own_block [B, T] is the block of its segment that holds the token. SHAPE is a `SelectionTileShape`; DESCRIPTORS:
    whether keys are a tensor descriptor, not a pointer.
    """
    T: tl.constexpr = SHAPE.T
    H: tl.constexpr = SHAPE.H
    G: tl.constexpr = SHAPE.G
    K: tl.constexpr = SHAPE.K
    INIT: tl.constexpr = SHAPE.INIT
    TOKENS: tl.constexpr = SHAPE.TOKENS
    HEADS: tl.constexpr = SHAPE.HEADS
    TILES: tl.constexpr = SHAPE.TILES
    program = tl.program_id(0)
    head = program % H
    nth = TILES - 1 - program // H % TILES  # late tokens see most, so they go first
    row = (program // (H * TILES)).to(tl.int64)
    token = nth * TOKENS + tl.arange(0, TOKENS)
    inside = token < T
    index = row * T + token
    queries = _load_queries(count, segment_start, own_block, key_begin, key_end, index, head, inside, SHAPE)

    query_row = tl.arange(0, TOKENS * HEADS)
    base = (row * T + nth * TOKENS) * (H * G) + head * G
    offset = query_row // HEADS * (H * G) + query_row % HEADS
    real = (nth * TOKENS + query_row // HEADS < T) & (query_row % HEADS < G)
    q = load_rows(query + base * K, offset * K, real, K, SHAPE.K_PARTS)  # [TOKENS * HEADS, K]
    row_lse = tl.load(lse + base + offset, mask=real, other=float("inf")) * LOG2E

    lane = tl.arange(0, LANES)[None, None, :]
    entry = tl.arange(0, SHAPE.LIST // LANES)[:, None, None] * LANES + lane
    list_rank, list_block, stop = _start_lists(queries, entry, SHAPE)

    BLOCKS: tl.constexpr = SHAPE.PARTS * SHAPE.KEYS // SHAPE.BLOCK_STRIDES
    GROUPS: tl.constexpr = BLOCKS // LANES
    group = tl.arange(0, GROUPS)[:, None, None]
    waiting = tl.where(stop > INIT, queries.start, NOWHERE)
    start = tl.min(waiting, 0)
    while start < NOWHERE:
        mine = waiting == start
        first = tl.max(tl.where(mine, queries.begin, 0), 0)
        windows = tl.max(tl.where(mine, queries.seen, 0), 0)
        segment = Segment(first, windows, tl.max(tl.where(mine, stop, 0), 0))
        carry = tl.zeros([TOKENS], dtype=tl.float32)
        for chunk in range(tl.cdiv(segment.stop, BLOCKS)):
            importance, carry = _importance(
                compressed_key, q, row_lse, chunk, segment, queries.seen, carry, row, head, SHAPE, DESCRIPTORS
            )
            rank = tl.maximum(importance, 0.0).to(tl.int32, bitcast=True)  # NaN gives 0
            rank = tl.permute(tl.reshape(rank, [TOKENS, GROUPS, LANES]), (1, 0, 2))
            block = chunk * BLOCKS + group * LANES + lane  # [GROUPS, 1, LANES]
            candidate = mine[None, :, None] & (block >= INIT) & (block < stop[None, :, None])
            list_rank, list_block = _insert(tl.where(candidate, rank, -1), block, list_rank, list_block, TOKENS)
        waiting = tl.where(mine, NOWHERE, waiting)
        start = tl.min(waiting, 0)

    chosen = _ascending(list_block, entry, queries, SHAPE)
    pointers = block_indices + (index * H + head)[None, :, None] * SHAPE.S + entry
    tl.store(pointers, chosen, mask=inside[None, :, None] & (entry < SHAPE.S))
