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
