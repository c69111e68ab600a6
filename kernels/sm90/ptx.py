"""The inline assembly of the kernels for Hopper (sm_90), a function per instruction or short sequence."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def arrive(barrier):
    """Arrives once for this warp, when all its threads are here."""
    gl.inline_asm(
        "{ .reg .pred first; .reg .u32 lane; bar.warp.sync 0xffffffff; mov.u32 lane, %laneid;"
        " setp.eq.u32 first, lane, 0; @first mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        "r,~{memory}",
        [barrier],
    )


@gluon.constexpr_function
def _clear(columns):
    """Assembly that overwrites two rows of this lane with zeros, each if its flag is set."""
    stores = "".join(
        f" xor.b32 to, at, {chunk};"
        + "".join(
            f" @p{row} st.shared.v4.b32 [to+{piece * 64 * 128 + row * 128}], {{zero, zero, zero, zero}};"
            for row in range(2)
            for piece in range(columns // 64)
        )
        for chunk in range(0, 128, 16)
    )
    return (
        "{ .reg .pred p0, p1; .reg .b32 zero; .reg .u32 lane, at, to; mov.b32 zero, 0; mov.u32 lane, %laneid;"
        " mad.lo.u32 at, lane, 256, $0; and.b32 lane, lane, 7; mad.lo.u32 at, lane, 16, at;"  # other banks than others
        f" setp.ne.s32 p0, $1, 0; setp.ne.s32 p1, $2, 0;{stores} }}"
    )


@gluon.jit
def clear_rows(tile, which, COLUMNS: gl.constexpr):
    """Overwrites rows of a tile [64, COLUMNS] of two-byte elements with zeros, those whose `which` [64] is not 0.

    The tile lies in a swizzle of 128 bytes: 64 columns of all rows, then the next 64; a swizzle moves nothing from row
    to row. `which`, int32, is held by one warp, two neighbours a lane. `fence_async_shared()` must follow before a
    product reads the tile.
    """
    asm: gl.constexpr = _clear(COLUMNS)
    gl.inline_asm(asm, "r,r,r,~{memory}", [tile, which])
