"""Where the keys of a cache lie, and where the queries of a step stand."""

import triton
import triton.language as tl

from ..tiles import load_rows


@triton.aggregate
class Tile:
    """Keys of one tile.

    Attributes:
        base: where the tile begins, a 64-bit number of keys from the start of the array.
        offset: [KEYS], number of keys from there.
        inside: [KEYS], whether there is such a key; others are not read.
    """

    base: tl.tensor
    offset: tl.tensor
    inside: tl.tensor


@triton.jit
def placement(start, count, length, row, SHAPE: tl.constexpr):
    """Where the first query of a batch row stands, and how many stand in the row: those before its length, if told."""
    place = tl.load(start + row)
    placed = tl.minimum(tl.load(count + row), SHAPE.QUERIES)
    if SHAPE.WITH_LENGTH:
        placed = tl.minimum(placed, tl.load(length + row) - place)
    return place, placed


@triton.jit
def locate(
    page_indices, row, first, inside, LENGTH: tl.constexpr, PAGE: tl.constexpr, POOL: tl.constexpr, KEYS: tl.constexpr
):
    """The `Tile` of the keys from `first` on, a multiple of KEYS, of a batch row.

    A row has room for LENGTH keys: in one piece [B, LENGTH, H, D] where PAGE is 0, else in pages of PAGE keys, of which
    there are POOL, [POOL, PAGE, H, D]. A page beyond them is never read.
    """
    local = tl.arange(0, KEYS)
    if PAGE == 0:
        return Tile(row * LENGTH + first, local, inside)
    elif PAGE % KEYS == 0:
        page = tl.load(page_indices + row * (LENGTH // PAGE) + first // PAGE)
        page = tl.minimum(tl.maximum(page, 0), POOL - 1).to(tl.int64)
        return Tile(page * PAGE + first % PAGE, local, inside)
    else:
        page = tl.load(page_indices + row * (LENGTH // PAGE) + (first + local) // PAGE, mask=inside, other=0)
        page = tl.minimum(tl.maximum(page, 0), POOL - 1).to(tl.int64)
        return Tile(row * 0, page * PAGE + (first + local) % PAGE, inside)


@triton.jit
def load_tile(source, tile, head, H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """The rows of a tile and kv head, a tuple of [KEYS, PARTS[i]] tiles."""
    return load_rows(source + (tile.base * H + head) * D, tile.offset * (H * D), tile.inside, D, PARTS)


@triton.jit
def split_range(tiles, split, SPLITS: tl.constexpr):
    """The tiles [first, last) of one of SPLITS splits of so many tiles."""
    each = tl.cdiv(tiles, SPLITS)
    first = split * each
    return first, tl.minimum(first + each, tiles)


@triton.jit
def windows_seen(position, WINDOW: tl.constexpr, STRIDE: tl.constexpr):
    """How many windows a query at `position` sees; -1 stands for padding, which sees none."""
    return tl.maximum(position + 1 - WINDOW + STRIDE, 0) // STRIDE
