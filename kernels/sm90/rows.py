"""What the kernels for Hopper (sm_90), written in Gluon, share: tiles in shared memory, copies of rows, the order of
units."""

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..shape import Shape

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
WIDTH = gl.constexpr(64)  # columns of rows that are copied at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitShape(Shape):
    """The sizes of kernels whose programs go through units, TILES for each head and batch row, each of UNIT query rows.

    Program i takes the units i, i + PROGRAMS, .. A kernel's own shape has UNIT, as a constant of the class.

    Attributes:
        B: batch rows.
        MULTIPROCESSORS: of the GPU, each of which holds one program.
        STAGES: slots of the ring of keys.
    """

    B: int
    MULTIPROCESSORS: int
    STAGES: int

    @property
    def TILES(self) -> int:
        return -(-self.T * self.G // self.UNIT)

    @property
    def UNITS(self) -> int:
        return self.TILES * self.H * self.B

    @property
    def PROGRAMS(self) -> int:
        return min(self.UNITS, self.MULTIPROCESSORS)


@gluon.constexpr_function
def product_layout(columns):
    """How a warpgroup has a product [64, columns] in its registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def lanes(tokens, warps):
    """How each of so many warps has all tokens in its registers."""
    return gl.BlockedLayout([max(1, tokens // 32)], [32], [warps], [0])


@gluon.jit
def place_of(unit, shape):
    """The tile, head and batch row of a unit; late tokens, which see most, first."""
    H: gl.constexpr = shape.H
    B: gl.constexpr = shape.B
    TILES: gl.constexpr = shape.TILES
    return TILES - 1 - unit // (H * B), unit % H, unit // H % B


@gluon.jit
def as_rows(slot, KEYS: gl.constexpr, D: gl.constexpr):
    """A tile in shared memory as [KEYS, D]."""
    return slot.reinterpret(slot.dtype, [KEYS, D], gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def as_columns(slot, KEYS: gl.constexpr, D: gl.constexpr):
    """A tile in shared memory as [D, KEYS]."""
    return slot.reinterpret(slot.dtype, [D, KEYS], gl.NVMMASharedLayout(128, 16, 2, transposed=True))


@gluon.jit
def store_rows(target, base, offset, rows, inside, D: gl.constexpr, layout: gl.constexpr):
    """Stores rows [.., D] as the rows base + offset of target [.., D], where they are inside."""
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    offset = gl.convert_layout(offset, gl.SliceLayout(1, layout), assert_trivial=True)
    inside = gl.convert_layout(inside, gl.SliceLayout(1, layout), assert_trivial=True)
    value = rows.to(target.dtype.element_ty)
    gl.store(target + base * D + (offset[:, None] * D + column[None, :]), value, mask=inside[:, None])


@gluon.jit
def copy_rows(source, tile, barrier, row, at, head, G: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr):
    """Copies the query rows at .. at + ROWS of a batch row and head of source [B, T, N, D] into tile [ROWS, D]."""
    PIECE: gl.constexpr = min(G, ROWS)
    pieces = tile.reinterpret(source.dtype, [D // WIDTH, 1, ROWS // PIECE, PIECE, WIDTH], source.layout)
    for i in gl.static_range(D // WIDTH):
        tma.async_load(source, [row, at // G, head * G + at % G, i * WIDTH], barrier, pieces.index(i))
