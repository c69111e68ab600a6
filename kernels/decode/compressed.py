"""The compressed branch of a step: the scores of blocks, and partial results by splits of the windows."""

import dataclasses

import triton
import triton.language as tl

from ..clean import finite_rows, keep_rows
from ..tiles import load_rows, store_rows, zeros
from .cache import load_tile, locate, placement, split_range, windows_seen
from .partial import exponents, store_statistics, take_in
from .shape import KeysShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedShape(KeysShape):
    """The sizes of `compressed`.

    Attributes:
        WINDOW, STRIDE: of the compression, in tokens.
        BLOCK_STRIDES: strides of a block.
        BLOCKS: scores of a query row.
        SPLITS: of the windows.
        WITH_SCORES, WITH_VALUE: whether scores of the blocks are written, and partial results.
    """

    WINDOW: int
    STRIDE: int
    BLOCK_STRIDES: int
    BLOCKS: int
    SPLITS: int
    WITH_SCORES: bool
    WITH_VALUE: bool

    @property
    def REACH(self) -> int:
        """Windows before a split that count for its first block, too."""
        return self.WINDOW // self.STRIDE - 1 if self.WITH_SCORES else 0


@triton.jit
def _block_scores(score, p, peak, carry, KEYS: tl.constexpr, BLOCK_STRIDES: tl.constexpr, WINDOW_STRIDES: tl.constexpr):
    """log2 of what its windows give to each block of a tile [ROWS, blocks], and what they give to the next block.

    The i-th window of a block shares min(WINDOW_STRIDES, BLOCK_STRIDES - i) strides with it, the rest with the next.
    carry [ROWS]: log2 of what the windows before give to the first block.
    """
    if BLOCK_STRIDES == 1:
        return score, carry
    else:
        ROWS: tl.constexpr = p.shape[0]
        BLOCKS: tl.constexpr = KEYS // BLOCK_STRIDES
        i = tl.arange(0, BLOCK_STRIDES)[None, None, :]
        p = tl.reshape(p, [ROWS, BLOCKS, BLOCK_STRIDES])
        importance = tl.sum(p * tl.minimum(BLOCK_STRIDES - i, WINDOW_STRIDES).to(tl.float32), 2)
        if WINDOW_STRIDES > 1:
            spill = tl.sum(p * tl.maximum(i + (WINDOW_STRIDES - BLOCK_STRIDES), 0).to(tl.float32), 2)
            column = tl.arange(0, BLOCKS)[None, :]
            before = tl.broadcast_to(tl.maximum(column - 1, 0), [ROWS, BLOCKS])
            importance += tl.where(column > 0, tl.gather(spill, before, 1), 0.0)
            to_own = peak[:, None] + tl.log2(importance)
            # to the first block by another peak, which may be far higher
            level = tl.maximum(to_own, carry[:, None])
            level = tl.where(level == float("-inf"), 0.0, level)
            both = level + tl.log2(tl.exp2(to_own - level) + tl.exp2(carry[:, None] - level))
            carry = peak + tl.log2(tl.sum(tl.where(column == BLOCKS - 1, spill, 0.0), 1))
            return tl.where(column == 0, both, to_own), carry
        else:
            return peak[:, None] + tl.log2(importance), carry


@triton.jit
def compressed(query, key, value, page_indices, start, count, length, scores, peaks, totals, sums, SHAPE: tl.constexpr):
    """A query row is a (query, head of the group) pair, number query * G + head, R = QUERIES * G of them.

    Writes, all float32: scores [B, H, R, BLOCKS], log2 of what its windows give to each block, in units of 2^lse;
    peaks, totals [B, H, SPLITS, R], sums [B, H, SPLITS, R, V]. Grid: B * SPLITS * TILES * H.
    """
    program = tl.program_id(0)
    head = program % SHAPE.H
    nth = program // SHAPE.H % SHAPE.TILES
    split = program // (SHAPE.H * SHAPE.TILES) % SHAPE.SPLITS
    row = (program // (SHAPE.H * SHAPE.TILES * SHAPE.SPLITS)).to(tl.int64)

    place, queries = placement(start, count, length, row, SHAPE)
    local = nth * SHAPE.ROWS + tl.arange(0, SHAPE.ROWS)
    inside = local < SHAPE.R
    i = local // SHAPE.G
    position = tl.minimum(place + i, SHAPE.CAPACITY - 1)
    seen = windows_seen(tl.where(i < queries, position, -1), SHAPE.WINDOW, SHAPE.STRIDE)  # [ROWS]
    windows = windows_seen(
        tl.where(queries > 0, tl.minimum(place + queries, SHAPE.CAPACITY) - 1, -1), SHAPE.WINDOW, SHAPE.STRIDE
    )
    first, last = split_range(tl.cdiv(windows, SHAPE.KEYS), split, SHAPE.SPLITS)

    q = load_rows(
        query + ((row * SHAPE.QUERIES) * SHAPE.H + head) * (SHAPE.G * SHAPE.K),
        i * (SHAPE.H * SHAPE.G * SHAPE.K) + local % SHAPE.G * SHAPE.K,
        inside & (i < queries),
        SHAPE.K,
        SHAPE.K_PARTS,
    )
    peak = tl.full([SHAPE.ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([SHAPE.ROWS], dtype=tl.float32)
    output = zeros(SHAPE.ROWS, SHAPE.V_PARTS)
    # the windows just before the split count for its first block alone: what is made of them else is undone
    carry = peak
    begin = tl.where(first < last, tl.maximum(first - (1 if SHAPE.REACH > 0 else 0), 0), last)
    earliest = first * SHAPE.KEYS - SHAPE.REACH
    for step in range(begin, last):
        number = step * SHAPE.KEYS + tl.arange(0, SHAPE.KEYS)
        tile = locate(
            page_indices,
            row,
            step * SHAPE.KEYS,
            (number >= earliest) & (number < windows),
            SHAPE.CAPACITY // SHAPE.STRIDE,
            SHAPE.PAGE,
            SHAPE.POOL,
            SHAPE.KEYS,
        )
        k = load_tile(key, tile, head, SHAPE.H, SHAPE.K, SHAPE.K_PARTS)
        v = load_tile(value, tile, head, SHAPE.H, SHAPE.V, SHAPE.V_PARTS) if SHAPE.WITH_VALUE else k
        if SHAPE.QUERIES > 1:  # they differ in what they see: what is not finite must not meet the weight 0 of others
            finite = finite_rows(k, SHAPE.K_PARTS)
            if SHAPE.WITH_VALUE:
                finite = tl.minimum(finite, finite_rows(v, SHAPE.V_PARTS))
                v = keep_rows(v, finite, SHAPE.V_PARTS)
            k = keep_rows(k, finite, SHAPE.K_PARTS)
            score = exponents(q, k, SHAPE.FACTOR, SHAPE.K_PARTS, SHAPE.PRECISION)
            score = tl.where(finite[None, :] == 1, score, float("nan"))
        else:
            score = exponents(q, k, SHAPE.FACTOR, SHAPE.K_PARTS, SHAPE.PRECISION)
        score = tl.where((number[None, :] < seen[:, None]) & (number >= earliest)[None, :], score, float("-inf"))
        p, peak, total, output = take_in(
            score, v, peak, total, output, SHAPE.WITH_VALUE, SHAPE.V_PARTS, SHAPE.PRECISION
        )
        if SHAPE.WITH_SCORES:
            block_score, carry = _block_scores(
                score, p, peak, carry, SHAPE.KEYS, SHAPE.BLOCK_STRIDES, SHAPE.WINDOW // SHAPE.STRIDE
            )
            block = step * (SHAPE.KEYS // SHAPE.BLOCK_STRIDES) + tl.arange(0, SHAPE.KEYS // SHAPE.BLOCK_STRIDES)
            at = ((row * SHAPE.H + head) * SHAPE.R + local)[:, None] * SHAPE.BLOCKS + block[None, :]
            tl.store(
                scores + at,
                block_score,
                mask=inside[:, None] & (block < tl.where(step < first, 0, SHAPE.BLOCKS))[None, :],
            )
            if SHAPE.REACH > 0:
                peak = tl.where(step < first, float("-inf"), peak)
    base = ((row * SHAPE.H + head) * SHAPE.SPLITS + split) * SHAPE.R + nth * SHAPE.ROWS
    store_statistics(peaks, totals, base, inside, peak, total)
    if SHAPE.WITH_VALUE:
        written = local < tl.where(first < last, SHAPE.R, 0)
        store_rows(sums + base * SHAPE.V, tl.arange(0, SHAPE.ROWS) * SHAPE.V, output, written, SHAPE.V, SHAPE.V_PARTS)
