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


@gluon.jit
def shared_address(memory):
    """Where a tile lies in shared memory, in bytes."""
    return gl.inline_asm("mov.u32 $0, $1;", "=r,r", [memory], gl.int32)


@gluon.jit
def load_word(address):
    """The int32 at an address of shared memory."""
    return gl.inline_asm("ld.shared.u32 $0, [$1];", "=r,r,~{memory}", [address], gl.int32)


@gluon.jit
def store_word(address, word):
    """Writes an int32 to shared memory. All threads of the warp have done so when one goes on."""
    gl.inline_asm("st.shared.u32 [$0], $1; bar.warp.sync 0xffffffff;", "r,r,~{memory}", [address, word])


@gluon.constexpr_function
def _load_each(outputs, inputs):
    return "\n".join(f"ld.shared.f32 {x}, [{at}];" for x, at in zip(outputs[0], inputs[0], strict=True))


@gluon.jit
def load_floats(addresses):
    """The float32 at each of a tensor of addresses in shared memory."""
    kind: gl.constexpr = gl.distributed_type(gl.float32, addresses.type.shape, addresses.type.layout)
    return gl.inline_asm(_load_each, ("=f", "r"), [addresses], kind)


@gluon.constexpr_function
def _store_pairs(count, stride):
    return "\n".join(f"st.shared.f32 [${i % 2}+{stride * (i // 2)}], ${2 + i};" for i in range(2 * count))


@gluon.constexpr_function
def _pair_inputs(count):
    return ",".join(["r"] * 2 + ["f"] * (2 * count) + ["~{memory}"])


@gluon.jit
def store_pairs(addresses, x, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Writes the COUNT pairs of float32 that a thread has of x, the i-th STRIDE * i bytes after its two addresses."""
    gl.inline_asm(_store_pairs(COUNT, STRIDE), _pair_inputs(COUNT), [addresses, x])


@gluon.constexpr_function
def _or_all(outputs, inputs):
    to = outputs[0][0]
    return "\n".join([f"mov.u32 {to}, 0;", *(f"or.b32 {to}, {to}, {x};" for x in inputs[0])])


@gluon.jit
def or_of_thread(x):
    """The bitwise or of the int32 that a thread has of x: a scalar, which differs where the threads' parts do."""
    return gl.inline_asm(_or_all, ("=&r", "r"), [x], gl.int32)


@gluon.jit
def warp_index():
    """The index of this warp: a scalar that differs by warp."""
    return gl.inline_asm(
        "mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; shfl.sync.idx.b32 $0, $0, 0, 0x1f, 0xffffffff;", "=r", [], gl.int32
    )


@gluon.jit
def set_bits(x):
    """How many bits of x are set."""
    return gl.inline_asm("popc.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=True)


@gluon.constexpr_function
def _tied(count):
    """Constraints of an instruction that gives back `count` floats as it gets them."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


@gluon.jit
def await_products(tensor, PENDING: gl.constexpr, WARPS: gl.constexpr):
    """The tensor of an asynchronous product of WARPS warps, when only the last PENDING (0 or 1) products may still run.

    `warpgroup_mma_wait` would have warpgroups of one partition wait for each other.
    """
    count: gl.constexpr = tensor.numel // (32 * WARPS)
    asm: gl.constexpr = "wgmma.wait_group.sync.aligned 1;" if PENDING == 1 else "wgmma.wait_group.sync.aligned 0;"
    return gl.inline_asm(asm, _tied(count), [tensor], tensor.type)


@gluon.jit
def meet():
    """Waits until all warps of both programs are here: each calls it once, before it has to do with the other."""
    gl.inline_asm("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "~{memory}", [])


@gluon.jit
def wait_in_pair(barrier, phase, rank):
    """Waits, each thread for itself, until this program's barrier has completed the phase of that parity."""
    gl.inline_asm(
        "{ .reg .pred done; .reg .u32 at; shl.b32 at, $2, 24; or.b32 at, at, $0;"
        " AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [at], $1; @!done bra AGAIN; }",
        "r,r,r,~{memory}",
        [barrier, phase, rank],
    )


@gluon.jit
def arrive_in_pair(barrier, rank):
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
    """Assembly that copies a tile, 64 columns at once, from the tensor map in a parameter of the kernel."""
    pieces = (
        f"add.u32 at, tile, {i * 2 * rows * 64}; add.u32 x, $1, {i * 64}; @first"
        " cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [at], [source, {x, $2, $3}], [barrier], both;"
        for i in range(columns // 64)
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
