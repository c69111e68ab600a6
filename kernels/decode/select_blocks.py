"""Selection of the blocks that the queries of a step attend to, by the scores that the compressed branch has left."""

import triton
import triton.language as tl

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
    """How many blocks the query at `index` of [B, QUERIES, H] takes; without COUNTED all take S."""
    return tl.minimum(tl.maximum(tl.load(block_counts + index), 0), S) if COUNTED else S


@triton.jit
def _forced(entry, own, rule):
    """The blocks that are always taken, by their order of precedence [ENTRIES], and how many there are."""
    near = tl.minimum(own + 1, rule.LOCAL)
    return tl.where(entry < near, own - entry, entry - near), near + tl.minimum(own + 1 - near, rule.INIT)


@triton.jit
def _lse(peaks, totals, g, R: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """The lse in base 2 of the heads g [HEADS] of a group as [HEADS, 1]; 0 for heads that do not exist."""
    split = tl.arange(0, SPLITS_PADDED)[:, None]
    peak, total = load_statistics(peaks, totals, split * R + g[None, :], (split < SPLITS) & (g < G)[None, :])
    _, total, level = weights(peak, total, 0)
    return tl.where((g < G)[:, None], tl.trans(level + tl.log2(total)), 0.0)


@triton.jit
def _tainted(lse):
    """1 if an lse is NaN, which it is of a query that is not finite or sees what is not."""
    return tl.max(tl.max((lse != lse).to(tl.int32), 0), 0)


@triton.jit
def select(
    block_counts, start, count, own_scores, next_scores, peaks, totals, block_indices, taint,
    QUERIES: tl.constexpr, CAPACITY: tl.constexpr, H: tl.constexpr, G: tl.constexpr, COUNTED: tl.constexpr,
    S: tl.constexpr, BLOCK_SIZE: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, HEADS: tl.constexpr,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """block_indices int32 [B, H, QUERIES, S], in no order: of a query in block j the first min(its room, j + 1) count.
    taint float32 [B, H, QUERIES]: NaN for a query whose scores are not finite, else 0. Grid: B * QUERIES * H.

    CHUNK: blocks that are ranked at once, HEADS: heads that are added up at once, ENTRIES: S, padded.
    """
    rule = Rule(S, BLOCK_SIZE, INIT, LOCAL)
    R: tl.constexpr = QUERIES * G
    LAST: tl.constexpr = 0x7FFFFFFF  # less a block's number: of equal importance the smaller block is the larger
    program = tl.program_id(0)
    head = program % H
    i = program // H % QUERIES
    row = (program // (H * QUERIES)).to(tl.int64)
    own = tl.minimum(tl.load(start + row) + i, CAPACITY - 1) // BLOCK_SIZE
    room = room_of(block_counts, (row * QUERIES + i) * H + head, S, COUNTED)
    room = tl.where(i < tl.load(count + row), room, 0)
    group = row * H + head
    peaks += group * (SPLITS * R) + i * G
    totals += group * (SPLITS * R) + i * G
    own_scores += (group * R + i * G) * BLOCKS
    next_scores += (group * R + i * G) * BLOCKS

    entry = tl.arange(0, ENTRIES)
    chosen, forced = _forced(entry, own, rule)
    chosen = tl.where(own < room, entry, chosen)
    tainted = 0
    if (own < room) | (forced >= room):
        for first in tl.static_range(0, G, HEADS):
            lse = _lse(peaks, totals, first + tl.arange(0, HEADS), R, G, SPLITS, SPLITS_PADDED)
            tainted = tl.maximum(tainted, _tainted(lse))
    else:
        stop = own + 1 - LOCAL
        best = tl.full([ENTRIES], -1, dtype=tl.int64)
        for begin in range(0, stop, CHUNK):
            block = begin + tl.arange(0, CHUNK)
            read = (block < tl.cdiv(stop, 16) * 16)[None, :]  # wide loads: what lies behind does not count
            importance = tl.zeros([CHUNK], dtype=tl.float32)
            for first in tl.static_range(0, G, HEADS):
                g = first + tl.arange(0, HEADS)
                lse = _lse(peaks, totals, g, R, G, SPLITS, SPLITS_PADDED)
                tainted = tl.maximum(tainted, _tainted(lse))
                at = g[:, None] * BLOCKS + block[None, :]
                score = tl.load(own_scores + at, mask=(g < G)[:, None] & read, other=float("-inf"))
                importance += tl.sum(tl.exp2(score - lse), 0)
                if OVERLAP:
                    score = tl.load(next_scores + at, mask=(g < G)[:, None] & read, other=float("-inf"))
                    score = tl.where(block[None, :] > 0, score, float("-inf"))
                    importance += tl.sum(tl.exp2(score - lse), 0)
            # a float's bits order as the floats do, NaN counts as 0
            rank = tl.maximum(importance, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            rank = (rank << 32) | (LAST - block).to(tl.int64)
            rank = tl.where((block >= INIT) & (block < stop), rank, -1)
            after = tl.full([ENTRIES], -1, dtype=tl.int64)
            for nth in range(forced, room):
                largest = tl.max(rank, 0)
                if BLOCKS > CHUNK:
                    largest = tl.maximum(largest, tl.max(best, 0))
                    best = tl.where(best == largest, -1, best)
                rank = tl.where(rank == largest, -1, rank)
                after = tl.where(entry == nth, largest, after)
            best = after
        chosen = tl.where(entry < forced, chosen, LAST - (best & LAST).to(tl.int32))
    tl.store(block_indices + (group * QUERIES + i) * S + entry, chosen, mask=entry < S)
    tl.store(taint + group * QUERIES + i, tl.where((tainted > 0) & (room > 0), float("nan"), 0.0))
