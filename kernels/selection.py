"""Online top-k selection: the blocks that each query attends to, from scores that never leave the chip.

Shapes: query [B, T, N, K]; compressed_key [B, C, H, K]; lse [B, T, N]; N = H * G. A query's segment is known by the row
index it begins at, and query t of row b sees the windows in the slots [key_begin[b, t], key_end[b, t]): where a
query stands is data, a kernel never assumes that query i stands at key i. Windows and blocks count from the segment's
first, so that blocks line up.

A tile is TOKENS consecutive tokens by the HEADS (G, padded) of one group. It walks the windows of its segment, sums
their probabilities over the group, then over each block, and keeps a list of the best blocks per token. A list entry is
a block and its rank: the bits of its importance, which as integers order as the importances do. Forced blocks enter
the list first, so that only blocks before them are scored: candidates for what room is left.
"""

import triton
import triton.language as tl

from .softmax import LOG2E
from .tiles import inner, load_keys, load_rows

KEPT = tl.constexpr(0x7FFFFFFF)  # rank of an entry that nothing displaces
LANES = tl.constexpr(32)  # candidates lie across a warp's lanes, tokens across warps: rounds need no shared memory
NONE = tl.constexpr(0x40000000)  # blocks from here on stand for an empty place in the list


@triton.jit
def _group_probability(
    q, k, row_lse, TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr,
    K_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[TOKENS, KEYS]: the probability of each window, summed over the heads of the group."""
    # keys first: a group's heads then lie along a thread's registers, where the sum is cheap
    p = tl.exp2(inner(k, q, K_PARTS, PRECISION) * (SCALE * LOG2E) - row_lse[None, :])  # [KEYS, TOKENS * HEADS]
    return tl.trans(tl.sum(tl.reshape(p, [KEYS, TOKENS, HEADS]), 2))


@triton.jit
def _over_blocks(p, TOKENS: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr, REACH: tl.constexpr):
    """p [TOKENS, KEYS] to what its windows give to their own blocks and to the next ones, each [TOKENS, KEYS // SHARE].

    A block is SHARE strides, a window REACH: the i-th window of a block shares min(REACH, SHARE - i) of them with it,
    the rest with the next block.
    """
    i = tl.arange(0, SHARE)[None, None, :]
    windows = tl.reshape(p, [TOKENS, KEYS // SHARE, SHARE])
    own = tl.sum(windows * tl.minimum(SHARE - i, REACH).to(tl.float32), 2)
    if REACH > 1:
        return own, tl.sum(windows * tl.maximum(i + (REACH - SHARE), 0).to(tl.float32), 2)
    else:
        return own, own


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

    Of equal ranks the smaller block stays; chunks come in ascending order.
    """
    best, worst, more = _compare(rank, list_rank, TOKENS)
    while more > 0:
        chosen = _smallest(tl.where(rank == best, block, NONE))
        evicted = _largest(tl.where(list_rank == worst, list_block, -1))
        place = (best > worst) & (list_block == evicted)
        list_rank = tl.where(place, best, list_rank)
        list_block = tl.where(place, chosen, list_block)
        rank = tl.where(block == chosen, -1, rank)
        best, worst, more = _compare(rank, list_rank, TOKENS)
    return list_rank, list_block


@triton.jit
def select(
    query, compressed_key, lse, count, segment_start, own_block, key_begin, key_end, block_indices,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    SCALE: tl.constexpr, SHARE: tl.constexpr, REACH: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, LIST: tl.constexpr,
    TILES: tl.constexpr, K_PARTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """block_indices int32 [B, T, H, S], ascending, then -1; count [B, T, H] is how many to choose. Grid: H * TILES * B.

    own_block [B, T] is the block of its segment that holds the token; SHARE and REACH are the strides in a block and in
    a window.
    """
    program = tl.program_id(0)
    head = program % H
    tile = TILES - 1 - program // H % TILES  # late tokens see most: first
    row = (program // (H * TILES)).to(tl.int64)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    inside = token < T
    place = row * T + token
    room = tl.load(count + place * H + head, mask=inside, other=0)
    start = tl.load(segment_start + place, mask=inside, other=0)
    own = tl.load(own_block + place, mask=inside, other=0)
    begin = tl.load(key_begin + place, mask=inside, other=0)
    seen = tl.load(key_end + place, mask=inside, other=0) - begin

    slot = tl.arange(0, TOKENS * HEADS)
    base = (row * T + tile * TOKENS) * (H * G) + head * G
    offset = slot // HEADS * (H * G) + slot % HEADS
    real = (tile * TOKENS + slot // HEADS < T) & (slot % HEADS < G)
    q = load_rows(query + base * K, offset * K, real, K, K_PARTS)  # [TOKENS * HEADS, K]
    row_lse = tl.load(lse + base + offset, mask=real, other=float("inf")) * LOG2E

    lane = tl.arange(0, LANES)[None, None, :]
    entry = tl.arange(0, LIST // LANES)[:, None, None] * LANES + lane  # [LIST // LANES, 1, LANES]
    near = tl.minimum(own + 1, LOCAL)
    forced = near + tl.minimum(own + 1 - near, INIT)
    all_fit = own < room
    fixed = entry < tl.where(all_fit, own + 1, tl.minimum(forced, room))[None, :, None]
    by_priority = tl.where(entry < near[None, :, None], own[None, :, None] - entry, entry - near[None, :, None])
    list_block = tl.where(fixed, tl.where(all_fit[None, :, None], entry, by_priority), NONE + entry)
    list_rank = tl.where(fixed | (entry >= room[None, :, None]), KEPT, -1)  # [LIST // LANES, TOKENS, LANES]
    stop = tl.where(all_fit | (forced >= room), 0, own + 1 - LOCAL)  # candidates are the blocks [INIT, stop)

    BLOCKS: tl.constexpr = PARTS * KEYS // SHARE
    GROUPS: tl.constexpr = BLOCKS // LANES
    group = tl.arange(0, GROUPS)[:, None, None]
    waiting = tl.where(stop > INIT, start, T)
    segment = tl.min(waiting, 0)
    while segment < T:
        mine = waiting == segment
        first = tl.max(tl.where(mine, begin, 0), 0)
        windows = tl.max(tl.where(mine, seen, 0), 0)
        last = tl.max(tl.where(mine, stop, 0), 0)
        carry = tl.zeros([TOKENS], dtype=tl.float32)
        for chunk in range(tl.cdiv(last, BLOCKS)):
            importance = tl.zeros([TOKENS, PARTS, KEYS // SHARE], dtype=tl.float32)
            spill = tl.zeros([TOKENS, PARTS, KEYS // SHARE], dtype=tl.float32)
            for part in range(tl.minimum(PARTS, tl.cdiv(last * SHARE - chunk * (PARTS * KEYS), KEYS))):
                window = (chunk * PARTS + part) * KEYS + tl.arange(0, KEYS)
                slot_of_tile = first + (chunk * PARTS + part) * KEYS
                k = load_keys(
                    compressed_key, row, slot_of_tile, head, window < windows, C, H, K, KEYS, K_PARTS, DESCRIPTORS
                )  # [KEYS, K]
                p = _group_probability(q, k, row_lse, TOKENS, HEADS, KEYS, SCALE, K_PARTS, PRECISION)
                p = tl.where(window[None, :] < seen[:, None], p, 0.0)
                here = tl.arange(0, PARTS)[None, :, None] == part
                if SHARE == 1:
                    importance = tl.where(here, p[:, None, :], importance)
                else:
                    to_own, to_next = _over_blocks(p, TOKENS, KEYS, SHARE, REACH)
                    importance = tl.where(here, to_own[:, None, :], importance)
                    if REACH > 1:
                        spill = tl.where(here, to_next[:, None, :], spill)

            importance = tl.reshape(importance, [TOKENS, BLOCKS])
            if REACH > 1:
                spill = tl.reshape(spill, [TOKENS, BLOCKS])
                column = tl.arange(0, BLOCKS)[None, :]
                before = tl.broadcast_to(tl.maximum(column - 1, 0), [TOKENS, BLOCKS])
                importance += tl.where(column == 0, carry[:, None], tl.gather(spill, before, 1))
                carry = tl.sum(tl.where(column == BLOCKS - 1, spill, 0.0), 1)
            rank = importance.to(tl.int32, bitcast=True)
            rank = tl.permute(tl.reshape(rank, [TOKENS, GROUPS, LANES]), (1, 0, 2))
            block = chunk * BLOCKS + group * LANES + lane  # [GROUPS, 1, LANES]
            candidate = mine[None, :, None] & (block >= INIT) & (block < stop[None, :, None])
            list_rank, list_block = _insert(tl.where(candidate, rank, -1), block, list_rank, list_block, TOKENS)
        waiting = tl.where(mine, T, waiting)
        segment = tl.min(waiting, 0)

    chosen = tl.full([LIST // LANES, TOKENS, LANES], -1, dtype=tl.int32)
    for i in range(tl.max(tl.minimum(room, own + 1), 0)):
        smallest = _smallest(list_block)
        chosen = tl.where((entry == i) & (smallest < NONE), smallest, chosen)
        list_block = tl.where(list_block == smallest, KEPT, list_block)
    pointers = block_indices + (place * H + head)[None, :, None] * S + entry
    tl.store(pointers, chosen, mask=inside[None, :, None] & (entry < S))
