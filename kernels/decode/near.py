"""The selected and the sliding branch of a step: partial results by splits of their keys."""

import dataclasses

import triton
import triton.language as tl

from ..tiles import load_rows, store_rows, zeros
from .cache import load_tile, locate, placement, split_range
from .partial import exponents, store_statistics, take_in
from .select_blocks import room_of
from .shape import KeysShape, SelectedShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearShape(KeysShape, SelectedShape):
    """The sizes of `near`.

    Attributes:
        WINDOW: tokens of the sliding window.
        ALL: whether every block is selected.
        SELECTED_SPLITS, SLIDING_SPLITS: of the keys of each branch, 0 where it is dropped.
    """

    WINDOW: int
    ALL: bool
    SELECTED_SPLITS: int
    SLIDING_SPLITS: int

    @property
    def SPLITS(self) -> int:
        return self.SELECTED_SPLITS + self.SLIDING_SPLITS

    @property
    def PIECES(self) -> int:
        """Tiles of a block."""
        return self.BLOCK_SIZE // self.KEYS


@triton.jit
def near(
    query,
    key,
    value,
    page_indices,
    start,
    count,
    length,
    block_counts,
    block_indices,
    peaks,
    totals,
    sums,
    SHAPE: tl.constexpr,
):
    """Writes peaks, totals [B, H, QUERIES, SPLITS, G] and sums [B, H, QUERIES, SPLITS, G, V], all float32.

    The splits are those of the selected branch, then those of the sliding one. A program's rows are heads of the group
    of one query, so that they see the same keys. Grid: B * QUERIES * SPLITS * TILES * H.
    """
    program = tl.program_id(0)
    head = program % SHAPE.H
    nth = program // SHAPE.H % SHAPE.TILES
    split = program // (SHAPE.H * SHAPE.TILES) % SHAPE.SPLITS
    i = program // (SHAPE.H * SHAPE.TILES * SHAPE.SPLITS) % SHAPE.QUERIES
    row = (program // (SHAPE.H * SHAPE.TILES * SHAPE.SPLITS * SHAPE.QUERIES)).to(tl.int64)

    place, queries = placement(start, count, length, row, SHAPE)
    valid = i < queries
    position = tl.minimum(place + i, SHAPE.CAPACITY - 1)
    selects = split < SHAPE.SELECTED_SPLITS
    first, last, begin, earliest = 0, 0, 0, 0
    if SHAPE.SLIDING_SPLITS > 0:
        begin = tl.maximum(position + 1 - SHAPE.WINDOW, 0) // SHAPE.KEYS * SHAPE.KEYS
        earliest = tl.where(selects, 0, position + 1 - SHAPE.WINDOW)
        tiles = tl.cdiv(position + 1 - begin, SHAPE.KEYS)
        first, last = split_range(tiles, split - SHAPE.SELECTED_SPLITS, SHAPE.SLIDING_SPLITS)
    if SHAPE.SELECTED_SPLITS > 0:
        room = room_of(block_counts, (row * SHAPE.QUERIES + i) * SHAPE.H + head, SHAPE)
        tiles = tl.minimum(room, position // SHAPE.BLOCK_SIZE + 1) * SHAPE.PIECES
        first_piece, last_piece = split_range(tiles, split, SHAPE.SELECTED_SPLITS)
        first, last = tl.where(selects, first_piece, first), tl.where(selects, last_piece, last)
    last = tl.where(valid, last, first)
    block_indices += ((row * SHAPE.H + head) * SHAPE.QUERIES + i) * SHAPE.S

    local = nth * SHAPE.ROWS + tl.arange(0, SHAPE.ROWS)
    inside = local < SHAPE.G
    q = load_rows(
        query + (((row * SHAPE.QUERIES + i) * SHAPE.H + head) * SHAPE.G) * SHAPE.K,
        local * SHAPE.K,
        local < tl.where(valid, SHAPE.G, 0),
        SHAPE.K,
        SHAPE.K_PARTS,
    )
    peak = tl.full([SHAPE.ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([SHAPE.ROWS], dtype=tl.float32)
    output = zeros(SHAPE.ROWS, SHAPE.V_PARTS)
    for step in range(first, last):
        token = begin + step * SHAPE.KEYS
        if SHAPE.SELECTED_SPLITS > 0:
            block = step // SHAPE.PIECES
            if not SHAPE.ALL:
                block = tl.load(block_indices + block, mask=selects, other=0)
            token = tl.where(selects, block * SHAPE.BLOCK_SIZE + step % SHAPE.PIECES * SHAPE.KEYS, token)
        number = token + tl.arange(0, SHAPE.KEYS)
        seen = (number >= earliest) & (number <= position)
        tile = locate(page_indices, row, token, seen, SHAPE.CAPACITY, SHAPE.PAGE, SHAPE.POOL, SHAPE.KEYS)
        k = load_tile(key, tile, head, SHAPE.H, SHAPE.K, SHAPE.K_PARTS)
        v = load_tile(value, tile, head, SHAPE.H, SHAPE.V, SHAPE.V_PARTS)
        score = exponents(q, k, SHAPE.FACTOR, SHAPE.K_PARTS, SHAPE.PRECISION)
        score = tl.where(seen[None, :], score, float("-inf"))
        _, peak, total, output = take_in(score, v, peak, total, output, True, SHAPE.V_PARTS, SHAPE.PRECISION)
    base = (((row * SHAPE.H + head) * SHAPE.QUERIES + i) * SHAPE.SPLITS + split) * SHAPE.G + nth * SHAPE.ROWS
    store_statistics(peaks, totals, base, inside, peak, total)
    written = local < tl.where(first < last, SHAPE.G, 0)
    store_rows(sums + base * SHAPE.V, tl.arange(0, SHAPE.ROWS) * SHAPE.V, output, written, SHAPE.V, SHAPE.V_PARTS)
