"""Where the keys of a cache lie, and where the queries of a step stand."""

import triton
import triton.language as tl

from ..tiles import load_rows


@triton.aggregate
class StepShape:
    """Sizes of a step.

    Attributes:
        QUERIES: queries of a batch row.
        CAPACITY: tokens that a batch row has room for.
        H: kv heads.
        G: query heads of a kv head.
        K, V: key and value width.
        K_PARTS, V_PARTS: powers of two into which the widths are cut, see tiles.py.
        PRECISION: of float32 products, Triton's `input_precision`.
    """

    QUERIES: tl.constexpr
    CAPACITY: tl.constexpr
    H: tl.constexpr
    G: tl.constexpr
    K: tl.constexpr
    V: tl.constexpr
    K_PARTS: tl.tuple
    V_PARTS: tl.tuple
    PRECISION: tl.constexpr


@triton.aggregate
class Layout:
    """How the keys of batch rows lie in memory.

    Attributes:
        KEYS: keys that a batch row has room for, [B, KEYS, H, D].
        PAGE: keys of a page, [POOL, PAGE, H, D]; 0 where rows lie in one piece.
        POOL: pages of all rows.
    """

    KEYS: tl.constexpr
    PAGE: tl.constexpr
    POOL: tl.constexpr


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
def locate(page_indices, row, first, inside, layout, KEYS: tl.constexpr):
    """The `Tile` of the keys from `first` on, a multiple of KEYS, of a batch row."""
    local = tl.arange(0, KEYS)
    if layout.PAGE == 0:
        return Tile(row * layout.KEYS + first, local, inside)
    else:
        PAGES: tl.constexpr = layout.KEYS // layout.PAGE
        if layout.PAGE % KEYS == 0:
            page = tl.load(page_indices + row * PAGES + first // layout.PAGE)
            page = tl.minimum(tl.maximum(page, 0), layout.POOL - 1).to(tl.int64)
            return Tile(page * layout.PAGE + first % layout.PAGE, local, inside)
        else:
            page = tl.load(page_indices + row * PAGES + (first + local) // layout.PAGE, mask=inside, other=0)
            page = tl.minimum(tl.maximum(page, 0), layout.POOL - 1).to(tl.int64)
            return Tile(row * 0, page * layout.PAGE + (first + local) % layout.PAGE, inside)


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
