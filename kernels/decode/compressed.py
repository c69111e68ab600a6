"""The compressed branch of a step: the scores of blocks, and partial results by splits of the windows."""

import triton
import triton.language as tl

from ..clean import finite_rows, keep_rows
from ..tiles import load_rows, store_rows, zeros
from .cache import load_tile, locate, placement, split_range, windows_seen
from .partial import exponents, store_statistics, take_in


@triton.jit
def _block_scores(score, p, peak, KEYS: tl.constexpr, BLOCK_STRIDES: tl.constexpr, WINDOW_STRIDES: tl.constexpr):
    """log2 of what the windows of a tile give to their own blocks and to the next ones, each [ROWS, blocks].

    The i-th window of a block shares min(WINDOW_STRIDES, BLOCK_STRIDES - i) strides with it, the rest with the next.
    """
    if BLOCK_STRIDES == 1:
        return score, score
    else:
        ROWS: tl.constexpr = p.shape[0]
        i = tl.arange(0, BLOCK_STRIDES)[None, None, :]
        p = tl.reshape(p, [ROWS, KEYS // BLOCK_STRIDES, BLOCK_STRIDES])
        own = tl.sum(p * tl.minimum(BLOCK_STRIDES - i, WINDOW_STRIDES).to(tl.float32), 2)
        to_own = peak[:, None] + tl.log2(own)
        if WINDOW_STRIDES > 1:
            spill = tl.sum(p * tl.maximum(i + (WINDOW_STRIDES - BLOCK_STRIDES), 0).to(tl.float32), 2)
            return to_own, peak[:, None] + tl.log2(spill)
        else:
            return to_own, to_own


@triton.jit
def compressed(
    query, key, value, page_indices, start, count, length, own_scores, next_scores, peaks, totals, sums,
    QUERIES: tl.constexpr, CAPACITY: tl.constexpr, WITH_LENGTH: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, PAGE: tl.constexpr,
    POOL: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, BLOCK_STRIDES: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    WITH_SCORES: tl.constexpr, WITH_VALUE: tl.constexpr,
):  # fmt: skip
    """A query row is a (query, head of the group) pair, number query * G + head, R = QUERIES * G of them.

    Writes, all float32: own_scores, next_scores [B, H, R, BLOCKS], log2 of what the windows of a block, and of the
    block before, give to its importance, in units of 2^lse; where BLOCK_STRIDES is 1 own_scores are scores of windows.
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
    for step in range(first, last):
        number = step * KEYS + tl.arange(0, KEYS)
        tile = locate(page_indices, row, step * KEYS, number < windows, CAPACITY // STRIDE, PAGE, POOL, KEYS)
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
        score = tl.where(number[None, :] < seen[:, None], score, float("-inf"))
        p, peak, total, output = take_in(score, v, peak, total, output, WITH_VALUE, V_PARTS, PRECISION)
        if WITH_SCORES:
            own, spill = _block_scores(score, p, peak, KEYS, BLOCK_STRIDES, WINDOW // STRIDE)
            block = step * (KEYS // BLOCK_STRIDES) + tl.arange(0, KEYS // BLOCK_STRIDES)
            at = ((row * H + head) * R + local)[:, None] * BLOCKS + block[None, :]
            written = inside[:, None] & (block < BLOCKS)[None, :]
            tl.store(own_scores + at, own, mask=written)
            if WINDOW > STRIDE:
                tl.store(next_scores + at + 1, spill, mask=written & (block < BLOCKS - 1)[None, :])
    base = ((row * H + head) * SPLITS + split) * R + nth * ROWS
    store_statistics(peaks, totals, base, inside, peak, total)
    if WITH_VALUE:
        written = local < tl.where(first < last, R, 0)
        store_rows(sums + base * V, tl.arange(0, ROWS) * V, output, written, V, V_PARTS)
