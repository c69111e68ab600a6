"""Loads, stores and products of tiles whose width is cut into power-of-two parts.

Triton tiles have power-of-two sides. A head width such as 192 is therefore held as a tuple of tiles, here of widths
(128, 64): `PARTS` lists those widths, one or two, `D` is the true width, and columns beyond `D` read as zero and are
never written.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, offset, mask, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows at base + offset [M] as a tuple of [M, PARTS[i]] tiles; masked rows read as zero.

    A 64-bit scalar base with 32-bit offsets keeps the address arithmetic of a loop down to one addition.
    """
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        column = i * PARTS[0] + tl.arange(0, PARTS[i])
        pointer = base + (offset[:, None] + column[None, :])
        if i * PARTS[0] + PARTS[i] <= D:  # a running sum here would make this a branch at run time
            tile = tl.load(pointer, mask=mask[:, None], other=0.0)
        else:
            tile = tl.load(pointer, mask=mask[:, None] & (column < D)[None, :], other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_keys(
    source,
    row,
    first,
    head,
    inside,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """KEYS rows from `first` on of one row and head of [B, C, H, D], as a tuple of [KEYS, PARTS[i]] tiles.

    Those that are not `inside` [KEYS] may be anything, those from C on are zero. DESCRIPTOR: `source` is no pointer but
    a tensor descriptor with blocks [1, KEYS, 1, D], which the copy engine reads.
    """
    if DESCRIPTOR:
        return (tl.reshape(source.load([row.to(tl.int32), first, head, 0]), [KEYS, D]),)
    else:
        base = source + ((row * C + first) * H + head) * D
        return load_rows(base, tl.arange(0, KEYS) * (H * D), inside, D, PARTS)


@triton.jit
def store_rows(base, offset, tiles, mask, D: tl.constexpr, PARTS: tl.constexpr):
    """Writes a tuple of [M, PARTS[i]] tiles to the rows at base + offset [M], in the buffer's dtype."""
    for i in tl.static_range(len(PARTS)):
        column = i * PARTS[0] + tl.arange(0, PARTS[i])
        value = tiles[i].to(base.dtype.element_ty)
        tl.store(base + (offset[:, None] + column[None, :]), value, mask=mask[:, None] & (column < D)[None, :])


@triton.jit
def zeros(M: tl.constexpr, PARTS: tl.constexpr):
    """A tuple of float32 [M, PARTS[i]] accumulators."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.zeros([M, PARTS[i]], dtype=tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor, PARTS: tl.constexpr):
    """Each tile times `factor` (a scalar, or [M, 1])."""
    products = ()
    for i in tl.static_range(len(PARTS)):
        products = products + (tiles[i] * factor,)
    return products


@triton.jit
def added(a, b, PARTS: tl.constexpr):
    """a + b, tile by tile."""
    sums = ()
    for i in tl.static_range(len(PARTS)):
        sums = sums + (a[i] + b[i],)
    return sums


@triton.jit
def where(rows, number, tiles, PARTS: tl.constexpr):
    """The tiles with `number` for all elements of the rows [M] that are true."""
    results = ()
    for i in tl.static_range(len(PARTS)):
        results = results + (tl.where(rows[:, None], number, tiles[i]),)
    return results


@triton.jit
def row_dot(a, b, PARTS: tl.constexpr):
    """float32 rowsum(a * b) [M] of tiles [M, PARTS[i]]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(PARTS)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def inner(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the width: [M, D], [N, D] -> float32 [M, N]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(PARTS)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(sums, a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a b: [M, D] + [M, N] [N, D]; `a` is rounded to the dtype of `b`."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.dot(a.to(b[i].dtype), b[i], sums[i], input_precision=PRECISION),)
    return tiles
