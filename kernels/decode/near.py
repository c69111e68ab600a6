"""The selected and the sliding branch of a step: partial results by splits of their keys."""

import triton
import triton.language as tl

from ..tiles import load_rows, store_rows, zeros
from .cache import load_tile, locate, placement, split_range
from .partial import exponents, store_statistics, take_in
from .select_blocks import room_of


@triton.jit
def near(
    query, key, value, page_indices, start, count, length, block_counts, block_indices, peaks, totals, sums,
    QUERIES: tl.constexpr, CAPACITY: tl.constexpr, WITH_LENGTH: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
    K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, PAGE: tl.constexpr,
    POOL: tl.constexpr, COUNTED: tl.constexpr, S: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ALL: tl.constexpr, SELECTED_SPLITS: tl.constexpr, SLIDING_SPLITS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes peaks, totals [B, H, QUERIES, SPLITS, G] and sums [B, H, QUERIES, SPLITS, G, V], all float32.

    The splits are those of the selected branch, then those of the sliding one. A program's rows are heads of the group
    of one query, so that they see the same keys. ALL: every block is selected. Grid: B * QUERIES * SPLITS * TILES * H.
    """
    SPLITS: tl.constexpr = SELECTED_SPLITS + SLIDING_SPLITS
    PIECES: tl.constexpr = BLOCK_SIZE // KEYS
    program = tl.program_id(0)
    head = program % H
    nth = program // H % TILES
    split = program // (H * TILES) % SPLITS
    i = program // (H * TILES * SPLITS) % QUERIES
    row = (program // (H * TILES * SPLITS * QUERIES)).to(tl.int64)

    place, queries = placement(start, count, length, row, QUERIES, WITH_LENGTH)
    valid = i < queries
    position = tl.minimum(place + i, CAPACITY - 1)
    selects = split < SELECTED_SPLITS
    first, last, begin, earliest = 0, 0, 0, 0
    if SLIDING_SPLITS > 0:
        begin = tl.maximum(position + 1 - WINDOW, 0) // KEYS * KEYS
        earliest = tl.where(selects, 0, position + 1 - WINDOW)
        tiles = tl.cdiv(position + 1 - begin, KEYS)
        first, last = split_range(tiles, split - SELECTED_SPLITS, SLIDING_SPLITS)
    if SELECTED_SPLITS > 0:
        room = room_of(block_counts, (row * QUERIES + i) * H + head, S, COUNTED)
        tiles = tl.minimum(room, position // BLOCK_SIZE + 1) * PIECES
        first_piece, last_piece = split_range(tiles, split, SELECTED_SPLITS)
        first, last = tl.where(selects, first_piece, first), tl.where(selects, last_piece, last)
    last = tl.where(valid, last, first)
    block_indices += ((row * H + head) * QUERIES + i) * S

    local = nth * ROWS + tl.arange(0, ROWS)
    inside = local < G
    q = load_rows(
        query + (((row * QUERIES + i) * H + head) * G) * K, local * K, local < tl.where(valid, G, 0), K, K_PARTS
    )
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    output = zeros(ROWS, V_PARTS)
    for step in range(first, last):
        token = begin + step * KEYS
        if SELECTED_SPLITS > 0:
            block = step // PIECES
            if not ALL:
                block = tl.load(block_indices + block, mask=selects, other=0)
            token = tl.where(selects, block * BLOCK_SIZE + step % PIECES * KEYS, token)
        number = token + tl.arange(0, KEYS)
        seen = (number >= earliest) & (number <= position)
        tile = locate(page_indices, row, token, seen, CAPACITY, PAGE, POOL, KEYS)
        k = load_tile(key, tile, head, H, K, K_PARTS)
        v = load_tile(value, tile, head, H, V, V_PARTS)
        score = exponents(q, k, FACTOR, K_PARTS, PRECISION)
        score = tl.where(seen[None, :], score, float("-inf"))
        _, peak, total, output = take_in(score, v, peak, total, output, True, V_PARTS, PRECISION)
    base = (((row * H + head) * QUERIES + i) * SPLITS + split) * G + nth * ROWS
    store_statistics(peaks, totals, base, inside, peak, total)
    written = local < tl.where(first < last, G, 0)
    store_rows(sums + base * V, tl.arange(0, ROWS) * V, output, written, V, V_PARTS)
