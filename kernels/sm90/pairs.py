"""Two programs of a Hopper GPU (sm_90) that run as one cluster: barriers of both, copies into both.

A kernel that calls `meet` is launched in clusters of two (nsa_jax/runtime/jax_triton_gluon.py): the lowest bit of
program_id is a program's rank in its pair. Triton knows nothing of it, and the addresses of barriers and tiles that it
gives to assembly lack the rank, which those of a cluster have in their upper eight bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .rows import WIDTH


@gluon.jit
def rank_in_pair():
    return gl.program_id(0) % 2


@gluon.jit
def meet():
    """Waits until all warps of both programs are here: each calls it once, before it has to do with the other."""
    gl.inline_asm("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "~{memory}", [])


@gluon.jit
def wait(barrier, phase, rank):
    """Waits, each thread for itself, until this program's barrier has completed the phase of that parity."""
    gl.inline_asm(
        "{ .reg .pred done; .reg .u32 at; shl.b32 at, $2, 24; or.b32 at, at, $0;"
        " AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [at], $1; @!done bra AGAIN; }",
        "r,r,r,~{memory}",
        [barrier, phase, rank],
    )


@gluon.jit
def arrive(barrier, rank):
    """Arrives once for this warp, when all its threads are here, at this program's barrier."""
    gl.inline_asm(
        "{ .reg .pred first; .reg .u32 lane, at; bar.warp.sync 0xffffffff; mov.u32 lane, %laneid;"
        " setp.eq.u32 first, lane, 0; shl.b32 at, $1, 24; or.b32 at, at, $0;"
        " @first mbarrier.arrive.shared::cta.b64 _, [at]; }",
        "r,r,~{memory}",
        [barrier, rank],
    )


@gluon.jit
def arrive_at_other(barrier, rank):
    """Arrives once for this warp at the other program's barrier."""
    gl.inline_asm(
        "{ .reg .pred first; .reg .u32 lane, at; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " mapa.shared::cluster.u32 at, $0, $1; @first mbarrier.arrive.shared::cluster.b64 _, [at]; }",
        "r,r,~{memory}",
        [barrier, rank ^ 1],
    )


@gluon.constexpr_function
def _copies(parameter, columns, rows):
    """Assembly that copies a tile of so many columns and rows from the tensor map in a parameter of the kernel."""
    pieces = (
        f"add.u32 at, tile, {i * 2 * rows * WIDTH.value}; add.u32 x, $1, {i * WIDTH.value}; @first"
        " cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [at], [source, {x, $2, $3}], [barrier], both;"
        for i in range(columns // WIDTH.value)
    )
    return (
        "{ .reg .pred first; .reg .u32 lane, at, x, tile, barrier; .reg .b64 source; .reg .b16 both; mov.b16 both, 3;"
        " bar.warp.sync 0xffffffff; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; shl.b32 at, $5, 24;"
        " or.b32 tile, at, $0; or.b32 barrier, at, $4;"
        f" mov.b64 source, {parameter}; cvta.param.u64 source, source; {' '.join(pieces)} }}"
    )


@gluon.jit
def copy_to_both(
    parameter: gl.constexpr, row, first, column, barrier, tile, rank, COLUMNS: gl.constexpr, ROWS: gl.constexpr
):
    """As tma.async_load of [1, ROWS, COLUMNS] at [row, first, column], into this tile and barrier of both programs.

    Begins when all threads of the warp are here: none is left waiting for what comes before.

    parameter: the descriptor's name in PTX, KERNEL_param_I, where a descriptor of three axes before it counts as seven.
    Assembly can take no descriptor.
    """
    asm: gl.constexpr = _copies(parameter, COLUMNS, ROWS)
    gl.inline_asm(asm, "r,r,r,r,r,r,~{memory}", [tile, column, first, row, barrier, rank])
