"""Selection of the blocks that the queries of a step attend to, by the scores that the compressed branch has left."""

import dataclasses

import triton
import triton.language as tl

from .cache import placement
from .partial import load_statistics, weights
from .shape import SelectedShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectShape(SelectedShape):
    """The sizes of `select`.

    Attributes:
        INIT, LOCAL: first and last blocks of a row that are always taken.
        BLOCKS: scores of a query row.
        SPLITS, SPLITS_PADDED: of the compressed branch, and that padded.
        HEADS: that are added up at once.
        LANES, WIDTH: LANES * WIDTH blocks are ranked at once, those of a lane by one warp.
        ENTRIES: S, padded.
        PAIRWISE: whether the best of the lanes are compared all at once, not one after the other.
    """

    INIT: int
    LOCAL: int
    BLOCKS: int
    SPLITS: int
    SPLITS_PADDED: int
    HEADS: int
    LANES: int
    WIDTH: int
    ENTRIES: int
    PAIRWISE: bool

    @property
    def CHUNK(self) -> int:
        """Blocks that are ranked at once."""
        return self.LANES * self.WIDTH


@triton.jit
def room_of(block_counts, index, SHAPE: tl.constexpr):
    """How many blocks the query at `index` of [B, QUERIES, H] takes: S, or what is counted there ("each") or for all
    queries alike ("one"), at most S."""
    S: tl.constexpr = SHAPE.S
    if SHAPE.COUNTED == "none":
        return S
    elif SHAPE.COUNTED == "one":
        return tl.minimum(tl.maximum(tl.load(block_counts), 0), S)
    else:
        return tl.minimum(tl.maximum(tl.load(block_counts + index), 0), S)


@triton.jit
def _forced(entry, own, SHAPE: tl.constexpr):
    """The blocks that are always taken, by their order of precedence [ENTRIES], and how many there are."""
    near = tl.minimum(own + 1, SHAPE.LOCAL)
    return tl.where(entry < near, own - entry, entry - near), near + tl.minimum(own + 1 - near, SHAPE.INIT)


@triton.jit
def _lse(peaks, totals, g, SHAPE: tl.constexpr):
    """The lse in base 2 of the heads g [HEADS] of a group; 0 for heads that do not exist."""
    split = tl.arange(0, SHAPE.SPLITS_PADDED)[None, :]
    peak, total = load_statistics(
        peaks, totals, split * SHAPE.R + g[:, None], (split < SHAPE.SPLITS) & (g < SHAPE.G)[:, None]
    )
    _, total, level = weights(peak, total, 1)
    return tl.where(g < SHAPE.G, tl.sum(level + tl.log2(total), 1), 0.0)


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
def select(block_counts, start, count, length, scores, peaks, totals, block_indices, taint, SHAPE: tl.constexpr):
    """block_indices int32 [B, H, QUERIES, S], in no order: of a query in block j the first min(its room, j + 1) count.
    taint float32 [B, H, QUERIES]: NaN for a query whose scores are not finite, else 0. Grid: B * QUERIES * H.
    """
    G: tl.constexpr = SHAPE.G
    HEADS: tl.constexpr = SHAPE.HEADS
    program = tl.program_id(0)
    head = program % SHAPE.H
    i = program // SHAPE.H % SHAPE.QUERIES
    row = (program // (SHAPE.H * SHAPE.QUERIES)).to(tl.int64)
    place, placed = placement(start, count, length, row, SHAPE)
    own = tl.minimum(place + i, SHAPE.CAPACITY - 1) // SHAPE.BLOCK_SIZE
    room = room_of(block_counts, (row * SHAPE.QUERIES + i) * SHAPE.H + head, SHAPE)
    room = tl.where(i < placed, room, 0)
    group = row * SHAPE.H + head
    peaks += group * (SHAPE.SPLITS * SHAPE.R) + i * G
    totals += group * (SHAPE.SPLITS * SHAPE.R) + i * G
    scores += (group * SHAPE.R + i * G) * SHAPE.BLOCKS
    block_indices += (group * SHAPE.QUERIES + i) * SHAPE.S

    entry = tl.arange(0, SHAPE.ENTRIES)
    chosen, forced = _forced(entry, own, SHAPE)
    chosen = tl.where(own < room, entry, chosen)
    tl.store(block_indices + entry, chosen, mask=entry < tl.minimum(tl.where(own < room, own + 1, forced), room))
    if (own < room) | (forced >= room):
        tainted = 0
        for first in tl.static_range(0, G, HEADS):
            lse = _lse(peaks, totals, first + tl.arange(0, HEADS), SHAPE)
            tainted = tl.maximum(tainted, tl.max((lse != lse).to(tl.int32), 0))
        tl.store(taint + group * SHAPE.QUERIES + i, tl.where((tainted > 0) & (room > 0), float("nan"), 0.0))
    else:
        stop = own + 1 - SHAPE.LOCAL
        lane = tl.arange(0, SHAPE.LANES)[:, None]
        best_rank = tl.full([SHAPE.LANES, SHAPE.ENTRIES], -1, dtype=tl.int32)
        best_block = tl.full([SHAPE.LANES, SHAPE.ENTRIES], -1, dtype=tl.int32)
        for begin in range(0, stop, SHAPE.CHUNK):
            block = begin + lane * SHAPE.WIDTH + tl.arange(0, SHAPE.WIDTH)[None, :]
            read = (block < tl.cdiv(stop, 16) * 16)[None, :, :]  # wide loads: what lies behind does not count
            importance = tl.zeros([SHAPE.LANES, SHAPE.WIDTH], dtype=tl.float32)
            for first in tl.static_range(0, G, HEADS):
                g = first + tl.arange(0, HEADS)
                at = g[:, None, None] * SHAPE.BLOCKS + block[None, :, :]
                inside = (g < G)[:, None, None] & read
                score = tl.load(scores + at, mask=inside, other=float("-inf"))
                # while they are on their way
                lse = _lse(peaks, totals, g, SHAPE)
                importance += tl.sum(tl.exp2(score - lse[:, None, None]), 0)
            # an lse that is NaN makes every importance NaN, that of block 0 too
            tl.store(taint + group * SHAPE.QUERIES + i + block * 0, importance - importance, mask=block == 0)
            # a float's bits order as the floats do, NaN counts as 0
            rank = tl.maximum(importance, 0.0).to(tl.int32, bitcast=True)
            rank = tl.where((block >= SHAPE.INIT) & (block < stop), rank, -1)
            best_rank, best_block = _take_best(
                rank, block, best_rank, best_block, room - forced, SHAPE.ENTRIES, SHAPE.BLOCKS > SHAPE.CHUNK
            )
        # one number that orders as ranks do, and equal ones by the smaller block
        best = tl.ravel((best_rank.to(tl.int64) << 32) | (0x7FFFFFFF - best_block).to(tl.int64))
        if SHAPE.PAIRWISE:
            before = tl.sum((best[:, None] > best[None, :]).to(tl.int32), 0)
            best_block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
            tl.store(block_indices + forced + before, best_block, mask=(best >= 0) & (before < room - forced))
        else:
            for nth in range(forced, room):
                largest = tl.max(best, 0)
                best = tl.where(best == largest, -1, best)
                tl.store(block_indices + nth, 0x7FFFFFFF - (largest & 0x7FFFFFFF).to(tl.int32))
