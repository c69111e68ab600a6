"""The compressed branch of a step: the scores of blocks, and partial results by splits of the windows."""

import triton
import triton.language as tl

from ..clean import finite_rows, keep_rows
from ..tiles import load_rows, store_rows, zeros
from .cache import load_tile, locate, placement, split_range, windows_seen
from .partial import exponents, store_statistics, take_in


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
def compressed(
    query, key, value, page_indices, start, count, length, scores, peaks, totals, sums,
    QUERIES: tl.constexpr, CAPACITY: tl.constexpr, WITH_LENGTH: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, PAGE: tl.constexpr,
    POOL: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, BLOCK_STRIDES: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    WITH_SCORES: tl.constexpr, WITH_VALUE: tl.constexpr,
):  # fmt: skip
    """A query row is a (query, head of the group) pair, number query * G + head, R = QUERIES * G of them.

    Writes, all float32: scores [B, H, R, BLOCKS], log2 of what its windows give to each block, in units of 2^lse;
    peaks, totals [B, H, SPLITS, R], sums [B, H, SPLITS, R, V]. Grid: B * SPLITS * TILES * H.
    """
    R: tl.constexpr = QUERIES * G
    program = tl.program_id(0)
    head = program % H
    nth = program // H % TILES
    split = program // (H * TILES) % SPLITS
    row = (program // (H * TILES * SPLITS)).to(tl.int64)

    place, queries = placement(start, count, length, row, QUERIES, WITH_LENGTH)
    local = nth * ROWS + tl.arange(0, ROWS)
    inside = local < R
    i = local // G
    position = tl.minimum(place + i, CAPACITY - 1)
    seen = windows_seen(tl.where(i < queries, position, -1), WINDOW, STRIDE)  # [ROWS]
    windows = windows_seen(tl.where(queries > 0, tl.minimum(place + queries, CAPACITY) - 1, -1), WINDOW, STRIDE)
    first, last = split_range(tl.cdiv(windows, KEYS), split, SPLITS)

    q = load_rows(
        query + ((row * QUERIES) * H + head) * (G * K),
        i * (H * G * K) + local % G * K, inside & (i < queries), K, K_PARTS,
    )  # fmt: skip
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    output = zeros(ROWS, V_PARTS)
    # the windows just before the split count for its first block alone: what is made of them else is undone
    REACH: tl.constexpr = WINDOW // STRIDE - 1 if WITH_SCORES else 0
    carry = peak
    begin = tl.where(first < last, tl.maximum(first - (1 if REACH > 0 else 0), 0), last)
    earliest = first * KEYS - REACH
    for step in range(begin, last):
        number = step * KEYS + tl.arange(0, KEYS)
        tile = locate(
            page_indices,
            row,
            step * KEYS,
            (number >= earliest) & (number < windows),
            CAPACITY // STRIDE,
            PAGE,
            POOL,
            KEYS,
        )
        k = load_tile(key, tile, head, H, K, K_PARTS)
        v = load_tile(value, tile, head, H, V, V_PARTS) if WITH_VALUE else k
        if QUERIES > 1:  # queries differ in what they see: what is not finite must not meet the weight 0 of others
            finite = finite_rows(k, K_PARTS)
            if WITH_VALUE:
                finite = tl.minimum(finite, finite_rows(v, V_PARTS))
                v = keep_rows(v, finite, V_PARTS)
            k = keep_rows(k, finite, K_PARTS)
            score = exponents(q, k, FACTOR, K_PARTS, PRECISION)
            score = tl.where(finite[None, :] == 1, score, float("nan"))
        else:
            score = exponents(q, k, FACTOR, K_PARTS, PRECISION)
        score = tl.where((number[None, :] < seen[:, None]) & (number >= earliest)[None, :], score, float("-inf"))
        p, peak, total, output = take_in(score, v, peak, total, output, WITH_VALUE, V_PARTS, PRECISION)
        if WITH_SCORES:
            block_score, carry = _block_scores(score, p, peak, carry, KEYS, BLOCK_STRIDES, WINDOW // STRIDE)
            block = step * (KEYS // BLOCK_STRIDES) + tl.arange(0, KEYS // BLOCK_STRIDES)
            at = ((row * H + head) * R + local)[:, None] * BLOCKS + block[None, :]
            tl.store(
                scores + at, block_score, mask=inside[:, None] & (block < tl.where(step < first, 0, BLOCKS))[None, :]
            )
            if REACH > 0:
                peak = tl.where(step < first, float("-inf"), peak)
    base = ((row * H + head) * SPLITS + split) * R + nth * ROWS
    store_statistics(peaks, totals, base, inside, peak, total)
    if WITH_VALUE:
        written = local < tl.where(first < last, R, 0)
        store_rows(sums + base * V, tl.arange(0, ROWS) * V, output, written, V, V_PARTS)
