"""Attention to chosen blocks of keys on Hopper (sm_90): the passes of ../selected.py, in Gluon.

A unit is TOKENS tokens x G heads, 128 rows, and the walk of its tokens (../block_lists.py). One warp copies the blocks
of the walk into a ring of STAGES slots, as far ahead as the ring allows. Two programs do neighbouring units at the same
time, in slots of the same number, and what both want comes from the L2 once (pairs.py): one of them copies the keys
into both rings, the other the values, when each has told that its slot is free.

Eight warps with 16 rows each take every block as it comes, and pass over those that their tokens do not want. A block
that few want is multiplied by each warp that wants it, for itself (`mma_v2`, 16 rows: nothing wasted, but each warp
reads the keys anew); one that at least TOGETHER tokens of a warpgroup want, by its four warps together
(`warpgroup_mma`, 64 rows).

So the eight warps, one partition to Gluon, branch each on its own, on scalars that differ by warp (`warp_index`). That
is sound while nothing in there makes warps wait for others, no `bar.sync` in the PTX, which tests/test_lowering.py
counts: products are waited for at once or by `_finished`, mbarriers waited for and arrived at in assembly, and no
layout change goes through shared memory (`assert_trivial`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma, warpgroup_mma

from ..block_lists import SHARED
from .pairs import Walks, allocate, rank_in_pair
from .ptx import (
    arrive_at_other,
    arrive_in_pair,
    await_products,
    copy_to_both,
    meet,
    set_bits,
    wait_in_pair,
    warp_index,
)
from .rows import LN2, LOG2E, as_columns, as_rows, store_rows

WARPS = gl.constexpr(8)
ROWS = gl.constexpr(128)
HALF = gl.constexpr(32)  # keys that a warpgroup multiplies at once
# layouts of one warp's product: the result, the operand that has its rows, the operand that has its columns
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))


@builtin
def _result(product, _semantic=None):
    return gl.tensor(product.handle, product.type.tensor_type)


@gluon.jit
def _finished(product, PENDING: gl.constexpr):
    """The tensor of an asynchronous product, when of all of them only the last PENDING may still run."""
    return await_products(_result(product), PENDING, WARPS)


@gluon.jit
def _bits(wanted_by, warp, NEIGHBOURS: gl.constexpr, G: gl.constexpr):
    """The bits of the tokens that the NEIGHBOURS rows around this warp's belong to."""
    tokens: gl.constexpr = max(1, NEIGHBOURS // G)
    first = warp * 16 // NEIGHBOURS * NEIGHBOURS // G
    return (wanted_by >> first) & ((1 << tokens) - 1)


@gluon.jit
def _wanted(wanted_by, warp, local, SHAPE: gl.constexpr):
    """Whether this warp wants a block, which rows do, of this warp, and whether its warpgroup multiplies it as one."""
    mine = _bits(wanted_by, warp, 16, SHAPE.G) != 0
    live = ((wanted_by >> local) & 1 == 1) if SHAPE.G < 16 else mine
    return mine, live, set_bits(_bits(wanted_by, warp, 64, SHAPE.G)) >= SHAPE.TOGETHER


@gluon.aggregate
class Rows:
    """The rows of a unit.

    Attributes:
        base: where the first one stands in [B, T, N].
        token: where the first token stands in [B, T].
        offset: [ROWS], from base.
        inside: [ROWS], whether there is such a row.
        local: [ROWS], the token's number in the unit.
    """

    base: gl.tensor
    token: gl.tensor
    offset: gl.tensor
    inside: gl.tensor
    local: gl.tensor

    @gluon.jit
    def load(self, source, D: gl.constexpr, layout: gl.constexpr):
        """[ROWS, D] of source [B, T, N, D]; rows that do not exist read as zero."""
        column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        pointer = source + self.base * D + (self.offset[:, None] * D + column[None, :])
        return gl.load(pointer, mask=self.inside[:, None], other=0.0)


@gluon.jit
def _rows(pair, rank, layout: gl.constexpr, SHAPE: gl.constexpr):
    """The `Rows` of a unit."""
    at = (pair % SHAPE.TILES * 2 + rank) * SHAPE.TOKENS
    head = pair // SHAPE.TILES % SHAPE.H
    token = (pair // (SHAPE.TILES * SHAPE.H)).to(gl.int64) * SHAPE.T + at
    row = gl.arange(0, ROWS, layout=layout)
    local = row // SHAPE.G
    base = (token * SHAPE.H + head) * SHAPE.G
    return Rows(base, token, local * SHAPE.N + row % SHAPE.G, at + local < SHAPE.T, local)


@gluon.jit
def _hide(score, first, row_place, layout: gl.constexpr, KEYS: gl.constexpr):
    """score [ROWS, KEYS], -inf at keys behind the row's place."""
    where = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
    return gl.where(where[None, :] <= row_place[:, None], score, float("-inf"))


@gluon.jit
def _copy_blocks(key, value, walks, ring, KERNEL: gl.constexpr, SHAPE: gl.constexpr):
    """Fills slot after slot of the ring with the blocks of the program's units."""
    KEYS: gl.constexpr = SHAPE.KEYS
    K: gl.constexpr = SHAPE.K
    V: gl.constexpr = SHAPE.V
    KEY: gl.constexpr = KERNEL + "_param_1"
    VALUE: gl.constexpr = KERNEL + "_param_8"
    rank = rank_in_pair()
    meet()
    n = 0
    phases = 0  # phases of `ready`, a bit per slot
    for pair in range(gl.program_id(0) // 2, SHAPE.UNITS, SHAPE.PROGRAMS):
        head = pair // SHAPE.TILES % SHAPE.H
        batch = pair // (SHAPE.TILES * SHAPE.H)
        walk = walks.of(pair, rank, SHAPE)
        first, wanted_by = walk.step(0, SHAPE)
        for i in range(walk.steps):
            slot = n % SHAPE.STAGES
            first_ahead, wanted_ahead = walk.step(i + 1, SHAPE)
            ring.wait_empty(n)
            full = ring.full.index(slot)
            if wanted_by == 0:
                arrive_in_pair(full, rank)
            else:
                mbarrier.expect(full, 2 * KEYS * (K + V))
                if wanted_by >= SHARED:
                    arrive_at_other(ring.ready.index(slot), rank)
                    wait_in_pair(ring.ready.index(slot), (phases >> slot) & 1, rank)
                    phases ^= 1 << slot
                    if rank == 0:
                        copy_to_both(KEY, batch, first, head * K, full, ring.keys.index(slot), rank, K, KEYS)
                    else:
                        copy_to_both(VALUE, batch, first, head * V, full, ring.values.index(slot), rank, V, KEYS)
                else:
                    tma.async_load(key, [batch, first, head * K], full, ring.keys.index(slot))
                    tma.async_load(value, [batch, first, head * V], full, ring.values.index(slot))
            first, wanted_by = first_ahead, wanted_ahead
            n += 1


@gluon.jit
def _only_meet():
    """What warps do that would otherwise be missed: a program has them by fours."""
    meet()


@gluon.jit
def _online_step(score, peak, total, sums, live, FACTOR: gl.constexpr):
    """Takes in score [ROWS, KEYS] for the rows that are live: probabilities, peak, total and the rescaled sums."""
    new_peak = gl.where(live, gl.maximum(peak, gl.max(score, 1) * FACTOR), peak)
    seen = new_peak > float("-inf")
    shrink = gl.exp2(peak - gl.where(seen, new_peak, 0.0))
    # one number per row hides all of it, which costs less than a mask
    subtrahend = gl.where(live & seen, new_peak, float("inf"))
    p = gl.exp2(score * FACTOR - subtrahend[:, None])
    return p, new_peak, total * shrink + gl.sum(p, 1), sums * shrink[:, None]


@gluon.jit
def _attend(query, place, walks, edges, sight, output, lse, ring, SHAPE: gl.constexpr):
    """The forward pass of the eight warps."""
    KEYS: gl.constexpr = SHAPE.KEYS
    K: gl.constexpr = SHAPE.K
    V: gl.constexpr = SHAPE.V
    group_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    group_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, V, 16])
    FACTOR: gl.constexpr = SHAPE.SCALE * LOG2E
    dtype: gl.constexpr = query.dtype.element_ty
    warp = warp_index()
    rank = rank_in_pair()
    meet()
    n = 0
    for pair in range(gl.program_id(0) // 2, SHAPE.UNITS, SHAPE.PROGRAMS):
        walk = walks.of(pair, rank, SHAPE)
        edge = gl.load(edges + pair)
        rows = _rows(pair, rank, gl.SliceLayout(1, LEFT), SHAPE)
        q = rows.load(query, K, LEFT)
        rows = _rows(pair, rank, gl.SliceLayout(1, MMA), SHAPE)
        row_place = gl.load(place + rows.token + rows.local, mask=rows.inside, other=-1)
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
        total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, MMA))
        sums = gl.full([ROWS, V], 0.0, gl.float32, MMA)
        first, wanted_by = walk.step(0, SHAPE)
        for i in range(walk.steps):
            slot = n % SHAPE.STAGES
            first_ahead, wanted_ahead = walk.step(i + 1, SHAPE)
            mine, live, together = _wanted(wanted_by, warp, rows.local, SHAPE)
            ring.wait_full(n, rank)
            k_columns = as_columns(ring.keys.index(slot), KEYS, K)
            v = as_rows(ring.values.index(slot), KEYS, V)
            if together:
                a = gl.convert_layout(q, gl.DotOperandLayout(0, group_k, 2), assert_trivial=True)
                nothing = gl.full([ROWS, KEYS], 0.0, gl.float32, group_k)
                score = gl.convert_layout(warpgroup_mma(a, k_columns, nothing, use_acc=False), MMA, assert_trivial=True)
                if first > edge:
                    score = _hide(score, first, row_place, MMA, KEYS)
                p, peak, total, sums = _online_step(score, peak, total, sums, live, FACTOR)
                a = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, group_v, 2), assert_trivial=True)
                sums = warpgroup_mma(a, v, gl.convert_layout(sums, group_v, assert_trivial=True))
                sums = gl.convert_layout(sums, MMA, assert_trivial=True)
            elif mine:
                score = mma_v2(q, k_columns.load(RIGHT), gl.full([ROWS, KEYS], 0.0, gl.float32, MMA))
                if first > edge:
                    score = _hide(score, first, row_place, MMA, KEYS)
                p, peak, total, sums = _online_step(score, peak, total, sums, live, FACTOR)
                sums = mma_v2(gl.convert_layout(p.to(dtype), LEFT, assert_trivial=True), v.load(RIGHT), sums)
            ring.release(n, rank)
            first, wanted_by = first_ahead, wanted_ahead
            n += 1
        seen = gl.load(sight + rows.base // SHAPE.G + rows.local * SHAPE.H, mask=rows.inside, other=0)
        # total is NaN where the query is
        sound = (seen == 1) & (total > 0.0)
        factor = gl.where(sound, 1.0 / total, float("nan"))
        result = gl.where((seen == 0)[:, None], 0.0, sums * factor[:, None])
        store_rows(output, rows.base, rows.offset, result, rows.inside, V, MMA)
        row_lse = gl.where(seen == 0, float("-inf"), float("nan"))
        row_lse = gl.where(sound, (peak + gl.log2(total)) * LN2, row_lse)
        gl.store(lse + rows.base + rows.offset, row_lse, mask=rows.inside)


@gluon.jit
def forward(query, key, value, place, begins, members, counts, edges, sight, output, lse, SHAPE: gl.constexpr):
    """output [B, T, N, V] and lse float32 [B, T, N], natural log. Grid: PROGRAMS pairs, for UNITS pairs of units.

    sight int8 [B, T, H] tells what a query sees: nothing (0), what is finite (1), something that is not (2).
    """
    ring = allocate(key, value, WARPS, SHAPE)
    walks = Walks(begins, members, counts)
    gl.warp_specialize(
        [
            (_attend, (query, place, walks, edges, sight, output, lse, ring, SHAPE)),
            (_copy_blocks, (key, value, walks, ring, "forward", SHAPE)),
            (_only_meet, ()),
            (_only_meet, ()),
        ],
        [1, 1, 2],
        [24, 24, 24],
    )


@gluon.aggregate
class Branch:
    """Pointers to what the query pass takes of a branch; the cotangent of its output is weight * d_output."""

    d_output: gl.tensor
    output: gl.tensor
    lse: gl.tensor
    weight: gl.tensor
    d_lse: gl.tensor


@gluon.jit
def _differentiate(
    query,
    branch,
    before,
    place,
    walks,
    edges,
    d_query,
    delta,
    ring,
    SHAPE: gl.constexpr,
    HAS_D_LSE: gl.constexpr,
    HAS_BEFORE: gl.constexpr,
):
    """The query pass of the eight warps."""
    KEYS: gl.constexpr = SHAPE.KEYS
    K: gl.constexpr = SHAPE.K
    V: gl.constexpr = SHAPE.V
    HALVES: gl.constexpr = KEYS // HALF
    group_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    group_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, K, 16])
    PART: gl.constexpr = 16
    FACTOR: gl.constexpr = SHAPE.SCALE * LOG2E
    dtype: gl.constexpr = query.dtype.element_ty
    warp = warp_index()
    rank = rank_in_pair()
    meet()
    n = 0
    for pair in range(gl.program_id(0) // 2, SHAPE.UNITS, SHAPE.PROGRAMS):
        walk = walks.of(pair, rank, SHAPE)
        edge = gl.load(edges + pair)
        rows = _rows(pair, rank, gl.SliceLayout(1, LEFT), SHAPE)
        q = rows.load(query, K, LEFT)
        do = rows.load(branch.d_output, V, LEFT)
        o = rows.load(branch.output, V, LEFT)
        row_delta = gl.sum(do.to(gl.float32) * o.to(gl.float32), 1)
        row_delta = gl.convert_layout(row_delta, gl.SliceLayout(1, MMA), assert_trivial=True)
        rows = _rows(pair, rank, gl.SliceLayout(1, MMA), SHAPE)
        base, offset, inside = rows.base, rows.offset, rows.inside
        row_lse = gl.load(branch.lse + base + offset, mask=inside, other=float("inf"))
        if HAS_D_LSE:
            row_delta -= gl.load(branch.d_lse + base + offset, mask=inside, other=0.0)
        row_delta = gl.where(row_lse == float("-inf"), 0.0, row_delta)
        gl.store(delta + base + offset, row_delta, mask=inside)
        row_lse *= LOG2E
        row_place = gl.load(place + rows.token + rows.local, mask=inside, other=-1)
        dq = gl.full([ROWS, K], 0.0, gl.float32, MMA)
        first, wanted_by = walk.step(0, SHAPE)
        for i in range(walk.steps):
            slot = n % SHAPE.STAGES
            first_ahead, wanted_ahead = walk.step(i + 1, SHAPE)
            mine, live, together = _wanted(wanted_by, warp, rows.local, SHAPE)
            # one number per row hides all of it, which costs less than a mask
            subtrahend = gl.where(live, row_lse, float("inf"))
            ring.wait_full(n, rank)
            k = as_rows(ring.keys.index(slot), KEYS, K)
            k_columns = as_columns(ring.keys.index(slot), KEYS, K)
            v_columns = as_columns(ring.values.index(slot), KEYS, V)
            if together:
                nothing = gl.full([ROWS, HALF], 0.0, gl.float32, group_s)
                q_side = gl.convert_layout(q, gl.DotOperandLayout(0, group_s, 2), assert_trivial=True)
                do_side = gl.convert_layout(do, gl.DotOperandLayout(0, group_s, 2), assert_trivial=True)
                dq = gl.convert_layout(dq, group_k, assert_trivial=True)
                for j in gl.static_range(HALVES):
                    k_half = k_columns.slice(j * HALF, HALF, dim=1)
                    v_half = v_columns.slice(j * HALF, HALF, dim=1)
                    score = warpgroup_mma(q_side, k_half, nothing, use_acc=False, is_async=True)
                    dp = warpgroup_mma(do_side, v_half, nothing, use_acc=False, is_async=True)
                    score = gl.convert_layout(_finished(score, 1), MMA, assert_trivial=True) * FACTOR
                    if first > edge:
                        score = _hide(score, first + j * HALF, row_place, MMA, HALF)
                    p = gl.exp2(score - subtrahend[:, None])
                    ds = p * (gl.convert_layout(_finished(dp, 0), MMA, assert_trivial=True) - row_delta[:, None])
                    a = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, group_k, 2), assert_trivial=True)
                    # one half's product runs while the other half's scores are awaited
                    dq = warpgroup_mma(a, k.slice(j * HALF, HALF), dq, is_async=j < HALVES - 1)
                dq = gl.convert_layout(dq, MMA, assert_trivial=True)
            elif mine:
                for j in gl.static_range(KEYS // PART):
                    nothing = gl.full([ROWS, PART], 0.0, gl.float32, MMA)
                    score = mma_v2(q, k_columns.slice(j * PART, PART, dim=1).load(RIGHT), nothing) * (
                        SHAPE.SCALE * LOG2E
                    )
                    dp = mma_v2(do, v_columns.slice(j * PART, PART, dim=1).load(RIGHT), nothing)
                    if first > edge:
                        score = _hide(score, first + j * PART, row_place, MMA, PART)
                    ds = gl.exp2(score - subtrahend[:, None]) * (dp - row_delta[:, None])
                    a = gl.convert_layout(ds.to(dtype), LEFT, assert_trivial=True)
                    dq = mma_v2(a, k.slice(j * PART, PART).load(RIGHT), dq)
            ring.release(n, rank)
            first, wanted_by = first_ahead, wanted_ahead
            n += 1
        factor = gl.load(branch.weight + base + offset, mask=inside, other=0.0) * SHAPE.SCALE
        factor = gl.where(row_lse != row_lse, float("nan"), factor)
        dq = gl.where((row_lse == float("-inf"))[:, None], 0.0, dq * factor[:, None])
        if HAS_BEFORE:
            dq += rows.load(before, K, MMA).to(gl.float32)
        store_rows(d_query, base, offset, dq, inside, K, MMA)


@gluon.jit
def backward_query(
    query,
    key,
    value,
    d_output,
    output,
    lse,
    weight,
    d_lse,
    before,
    place,
    begins,
    members,
    counts,
    edges,
    d_query,
    delta,
    SHAPE: gl.constexpr,
    HAS_D_LSE: gl.constexpr,
    HAS_BEFORE: gl.constexpr,
):
    """d_query [B, T, N, K] and delta float32 [B, T, N], as ../selected.py's `backward_query`. Grid: as `forward`."""
    ring = allocate(key, value, WARPS, SHAPE)
    walks = Walks(begins, members, counts)
    branch = Branch(d_output, output, lse, weight, d_lse)
    gl.warp_specialize(
        [
            (
                _differentiate,
                (query, branch, before, place, walks, edges, d_query, delta, ring, SHAPE, HAS_D_LSE, HAS_BEFORE),
            ),
            (_copy_blocks, (key, value, walks, ring, "backward_query", SHAPE)),
            (_only_meet, ()),
            (_only_meet, ()),
        ],
        [1, 1, 2],
        [24, 24, 24],
    )
