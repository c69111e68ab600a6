"""Selection of the blocks that the queries of a step attend to, by the scores that the compressed branch has left."""

import triton
import triton.language as tl

from .cache import placement
from .partial import load_statistics, weights


@triton.aggregate
class Rule:
    """By what rule blocks are chosen.

    Attributes:
        S: blocks that a query takes at most.
        BLOCK_SIZE: tokens of a block.
        INIT, LOCAL: first and last blocks of a row that are always taken.
    """

    S: tl.constexpr
    BLOCK_SIZE: tl.constexpr
    INIT: tl.constexpr
    LOCAL: tl.constexpr


@triton.jit
def room_of(block_counts, index, S: tl.constexpr, COUNTED: tl.constexpr):
    """How many blocks the query at `index` of [B, QUERIES, H] takes: S, or what is counted there ("each") or for all
    queries alike ("one"), at most S."""
    if COUNTED == "none":
        return S
    elif COUNTED == "one":
        return tl.minimum(tl.maximum(tl.load(block_counts), 0), S)
    else:
        return tl.minimum(tl.maximum(tl.load(block_counts + index), 0), S)


@triton.jit
def _forced(entry, own, rule):
    """The blocks that are always taken, by their order of precedence [ENTRIES], and how many there are."""
    near = tl.minimum(own + 1, rule.LOCAL)
    return tl.where(entry < near, own - entry, entry - near), near + tl.minimum(own + 1 - near, rule.INIT)


@triton.jit
def _lse(peaks, totals, g, R: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """The lse in base 2 of the heads g [HEADS] of a group; 0 for heads that do not exist."""
    split = tl.arange(0, SPLITS_PADDED)[None, :]
    peak, total = load_statistics(peaks, totals, split * R + g[:, None], (split < SPLITS) & (g < G)[:, None])
    _, total, level = weights(peak, total, 1)
    return tl.where(g < G, tl.sum(level + tl.log2(total), 1), 0.0)


@triton.jit
def _take_best(rank, block, best_rank, best_block, need, ENTRIES: tl.constexpr, MERGE: tl.constexpr):
    """The `need` best of each lane of candidates [LANES, WIDTH] and, with MERGE, of the lane's list [LANES, ENTRIES].

    A rank below 0 is no candidate; of equal ranks the smaller block is better.
    """
    NONE: tl.constexpr = 0x7FFFFFFF
    entry = tl.arange(0, ENTRIES)[None, :]
    list_rank = tl.full(best_rank.shape, -1, dtype=tl.int32)
    list_block = tl.full(best_block.shape, NONE, dtype=tl.int32)
    for nth in range(need):
        largest = tl.max(rank, 1, keep_dims=True)
        if MERGE:
            largest = tl.maximum(largest, tl.max(best_rank, 1, keep_dims=True))
        chosen = tl.min(tl.where(rank == largest, block, NONE), 1, keep_dims=True)
        if MERGE:
            listed = tl.min(tl.where(best_rank == largest, best_block, NONE), 1, keep_dims=True)
            chosen = tl.minimum(chosen, listed)
            best_rank = tl.where(best_block == chosen, -1, best_rank)
        rank = tl.where(block == chosen, -1, rank)
        here = entry == nth
        list_rank = tl.where(here, largest, list_rank)
        list_block = tl.where(here & (largest >= 0), chosen, list_block)
    return list_rank, list_block


@triton.jit
def select(
    block_counts, start, count, length, scores, peaks, totals, block_indices, taint,
    QUERIES: tl.constexpr, CAPACITY: tl.constexpr, WITH_LENGTH: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    COUNTED: tl.constexpr, S: tl.constexpr, BLOCK_SIZE: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, PAIRWISE: tl.constexpr,
):  # fmt: skip
    """block_indices int32 [B, H, QUERIES, S], in no order: of a query in block j the first min(its room, j + 1) count.
    taint float32 [B, H, QUERIES]: NaN for a query whose scores are not finite, else 0. Grid: B * QUERIES * H.

    LANES * WIDTH blocks are ranked at once, those of a lane by one warp, and HEADS heads are added up at once. ENTRIES
    is S, padded. PAIRWISE: the best of the lanes are compared all at once, not one after the other.
    """
    rule = Rule(S, BLOCK_SIZE, INIT, LOCAL)
    R: tl.constexpr = QUERIES * G
    CHUNK: tl.constexpr = LANES * WIDTH
    program = tl.program_id(0)
    head = program % H
    i = program // H % QUERIES
    row = (program // (H * QUERIES)).to(tl.int64)
    place, placed = placement(start, count, length, row, QUERIES, WITH_LENGTH)
    own = tl.minimum(place + i, CAPACITY - 1) // BLOCK_SIZE
    room = room_of(block_counts, (row * QUERIES + i) * H + head, S, COUNTED)
    room = tl.where(i < placed, room, 0)
    group = row * H + head
    peaks += group * (SPLITS * R) + i * G
    totals += group * (SPLITS * R) + i * G
    scores += (group * R + i * G) * BLOCKS
    block_indices += (group * QUERIES + i) * S

    entry = tl.arange(0, ENTRIES)
    chosen, forced = _forced(entry, own, rule)
    chosen = tl.where(own < room, entry, chosen)
    tl.store(block_indices + entry, chosen, mask=entry < tl.minimum(tl.where(own < room, own + 1, forced), room))
    if (own < room) | (forced >= room):
        tainted = 0
        for first in tl.static_range(0, G, HEADS):
            lse = _lse(peaks, totals, first + tl.arange(0, HEADS), R, G, SPLITS, SPLITS_PADDED)
            tainted = tl.maximum(tainted, tl.max((lse != lse).to(tl.int32), 0))
        tl.store(taint + group * QUERIES + i, tl.where((tainted > 0) & (room > 0), float("nan"), 0.0))
    else:
        stop = own + 1 - LOCAL
        lane = tl.arange(0, LANES)[:, None]
        best_rank = tl.full([LANES, ENTRIES], -1, dtype=tl.int32)
        best_block = tl.full([LANES, ENTRIES], -1, dtype=tl.int32)
        for begin in range(0, stop, CHUNK):
            block = begin + lane * WIDTH + tl.arange(0, WIDTH)[None, :]
            read = (block < tl.cdiv(stop, 16) * 16)[None, :, :]  # wide loads: what lies behind does not count
            importance = tl.zeros([LANES, WIDTH], dtype=tl.float32)
            for first in tl.static_range(0, G, HEADS):
                g = first + tl.arange(0, HEADS)
                at = g[:, None, None] * BLOCKS + block[None, :, :]
                inside = (g < G)[:, None, None] & read
                score = tl.load(scores + at, mask=inside, other=float("-inf"))
                # while they are on their way
                lse = _lse(peaks, totals, g, R, G, SPLITS, SPLITS_PADDED)
                importance += tl.sum(tl.exp2(score - lse[:, None, None]), 0)
            # an lse that is NaN makes every importance NaN, that of block 0 too
            tl.store(taint + group * QUERIES + i + block * 0, importance - importance, mask=block == 0)
            # a float's bits order as the floats do, NaN counts as 0
            rank = tl.maximum(importance, 0.0).to(tl.int32, bitcast=True)
            rank = tl.where((block >= INIT) & (block < stop), rank, -1)
            best_rank, best_block = _take_best(
                rank, block, best_rank, best_block, room - forced, ENTRIES, BLOCKS > CHUNK
            )
        # one number that orders as ranks do, and equal ones by the smaller block
        best = tl.ravel((best_rank.to(tl.int64) << 32) | (0x7FFFFFFF - best_block).to(tl.int64))
        if PAIRWISE:
            before = tl.sum((best[:, None] > best[None, :]).to(tl.int32), 0)
            best_block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
            tl.store(block_indices + forced + before, best_block, mask=(best >= 0) & (before < room - forced))
        else:
            for nth in range(forced, room):
                largest = tl.max(best, 0)
                best = tl.where(best == largest, -1, best)
                tl.store(block_indices + nth, 0x7FFFFFFF - (largest & 0x7FFFFFFF).to(tl.int32))
