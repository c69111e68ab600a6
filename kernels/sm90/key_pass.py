"""What the passes from the keys' side share on Hopper (sm_90): selected_keys.py and interval_keys.py.

A program has 64 keys and a list of slots of 64 query rows. One warp copies queries and cotangents into a ring; another
brings the rows' statistics and clears rows that do not count; one warpgroup multiplies. Keys are the rows of all four
products, so that probabilities go from one to the next in registers. Two programs share a multiprocessor: one's
products run beside the other's exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .ptx import clear_rows
from .ring import Ring, allocate_barriers
from .rows import LOG2E, as_columns, as_rows, product_layout

WARPS = gl.constexpr(4)
KEYS = gl.constexpr(64)
ROWS = gl.constexpr(64)
STATISTICS = gl.constexpr(3)  # a row's lse in base 2, delta and weight
SCORES = gl.constexpr(product_layout(64))
KEY = gl.constexpr(gl.SliceLayout(1, SCORES.value))
ROW = gl.constexpr(gl.SliceLayout(0, SCORES.value))
NOT_REAL = gl.constexpr(1e30)  # lse of rows that are not there: finite, and probability 0
LANES = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # a slot's rows in one warp


@gluon.aggregate
class KeyTile(Ring):
    """The keys of a program, a ring of one slot: keys [1, KEYS, K] and values [1, KEYS, V]."""

    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor

    @gluon.jit
    def copy(self, n, key, value, row, first, head, shape):
        """Copies the keys from `first` on as the n-th tile of the program, whose slot is free."""
        barrier = self.expect(n, 2 * KEYS * (shape.K + shape.V))
        tma.async_load(key, [row, first, head * shape.K], barrier, self.keys)
        tma.async_load(value, [row, first, head * shape.V], barrier, self.values)


@gluon.aggregate
class RowRing(Ring):
    """Query rows: queries [STAGES, ROWS, K], cotangents [STAGES, ROWS, V], statistics [STAGES * STATISTICS, ROWS].

    A slot is full when its statistics are there and dead rows are cleared; `copied` are barriers, one per slot, that
    complete when queries and cotangents are there.
    """

    copied: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor
    cotangents: gl.shared_memory_descriptor
    statistics: gl.shared_memory_descriptor

    @gluon.jit
    def statistic(self, n, i: gl.constexpr):
        """The i-th statistic [ROWS] of the rows in the n-th slot."""
        return self.statistics.index(n % self.STAGES * STATISTICS + i)

    @gluon.jit
    def begin_copy(self, n, shape):
        """Waits until the n-th slot is free. Gives its queries, its cotangents and the barrier for their copies."""
        slot = n % self.STAGES
        self.wait_empty(n)
        barrier = self.copied.index(slot)
        mbarrier.expect(barrier, 2 * ROWS * (shape.K + shape.V))
        return self.queries.index(slot), self.cotangents.index(slot), barrier

    @gluon.jit
    def wait_copied(self, n):
        """Waits until queries and cotangents of the n-th slot are there."""
        mbarrier.wait(self.copied.index(n % self.STAGES), (n // self.STAGES) & 1)

    @gluon.jit
    def bring_statistics(self, n, lse, delta, weight, offset, real, shape):
        """Loads those of the rows at `offset` into the n-th slot, and sees to it that dead rows do not count.

        A row whose lse is not finite is dead, and may hold anything. Where a slot has one, this warp waits for copies
        and overwrites such rows with zeros; then the slot is full. In place of rows that are not real, rows that are
        finite must have been copied, or real ones of the same slot: they too are overwritten.
        """
        row_lse = gl.load(lse + offset, mask=real, other=NOT_REAL)
        row_delta = gl.load(delta + offset, mask=real, other=0.0)
        row_weight = gl.load(weight + offset, mask=real, other=0.0)
        live = gl.abs(row_lse) < float("inf")
        row_lse = gl.where(live, row_lse * LOG2E, float("inf"))
        row_delta = gl.where(live, row_delta, 0.0)
        row_weight = gl.where(live, row_weight, 0.0)
        any_dead = gl.max((~live).to(gl.int32), 0)
        self.wait_empty(n)
        self.statistic(n, 0).store(row_lse)
        self.statistic(n, 1).store(row_delta)
        self.statistic(n, 2).store(row_weight)
        if any_dead != 0:
            self.wait_copied(n)
            which = (row_lse >= NOT_REAL).to(gl.int32)
            clear_rows(self.queries.index(n % self.STAGES), which, shape.K)
            clear_rows(self.cotangents.index(n % self.STAGES), which, shape.V)
            fence_async_shared()
        self.fill(n)


@gluon.jit
def allocate(query, key, value, d_output, shape):
    """The `KeyTile` and the `RowRing` of a program."""
    STAGES: gl.constexpr = shape.STAGES
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(key.dtype, [1, KEYS, shape.K], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [1, KEYS, shape.V], value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES, ROWS, shape.K], layout)
    cotangents = gl.allocate_shared_memory(d_output.dtype, [STAGES, ROWS, shape.V], layout)
    statistics = gl.allocate_shared_memory(
        gl.float32, [STAGES * STATISTICS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tile_full, tile_empty = allocate_barriers(1, 1, WARPS)
    full, empty = allocate_barriers(STAGES, 1, WARPS)
    copied = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(copied.index(i), count=1)
    fence_async_shared()
    gl.barrier()
    tile = KeyTile(tile_full, tile_empty, 1, keys, values)
    return tile, RowRing(full, empty, STAGES, copied, queries, cotangents, statistics)


@gluon.jit
def no_gradients(shape):
    """dk [KEYS, K] and dv [KEYS, V] to begin with."""
    dk = warpgroup_mma_init(gl.full([KEYS, shape.K], 0.0, gl.float32, product_layout(shape.K)))
    return dk, warpgroup_mma_init(gl.full([KEYS, shape.V], 0.0, gl.float32, product_layout(shape.V)))


@gluon.jit
def probabilities(tile, rows, n, is_first, dk, dv, shape):
    """weight * probability [KEYS, ROWS] of the n-th slot, and dk, dv, of which no product runs any more.

    Unless it is the first one of those keys, the slot before is given back.
    """
    rows.wait_copied(n)
    rows.wait_full(n)
    k = as_rows(tile.keys, KEYS, shape.K)
    q = as_columns(rows.queries.index(rows.slot(n)), ROWS, shape.K)
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    score = warpgroup_mma(k, q, nothing, use_acc=False, is_async=True)
    score, dk, dv = warpgroup_mma_wait(0, deps=[score, dk, dv])
    if not is_first:
        rows.release(n - 1)
    p = gl.exp2(score * (shape.SCALE * LOG2E) - rows.statistic(n, 0).load(ROW)[None, :])
    return p * rows.statistic(n, 2).load(ROW)[None, :], dk, dv


@gluon.jit
def add_gradients(tile, rows, n, p, dk, dv, shape):
    """dk [KEYS, K], still unscaled, and dv [KEYS, V] with what the n-th slot gives, products still running."""
    K: gl.constexpr = shape.K
    V: gl.constexpr = shape.V
    dtype: gl.constexpr = rows.queries.dtype
    q, do = rows.queries.index(rows.slot(n)), rows.cotangents.index(rows.slot(n))
    v = as_rows(tile.values, KEYS, V)
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    a = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, product_layout(V), 2), assert_trivial=True)
    dp = warpgroup_mma(v, as_columns(do, ROWS, V), nothing, use_acc=False, is_async=True)
    dv = warpgroup_mma(a, as_rows(do, ROWS, V), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - rows.statistic(n, 1).load(ROW)[None, :])
    a = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, product_layout(K), 2), assert_trivial=True)
    return warpgroup_mma(a, as_rows(q, ROWS, K), dk, is_async=True), dv


@gluon.jit
def store_keys(target, base, count, sums, H: gl.constexpr, D: gl.constexpr):
    """Stores the first `count` rows of sums [KEYS, D] as every H-th row of target [.., D], from row `base` on."""
    layout: gl.constexpr = product_layout(D)
    local = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    offset = local[:, None] * (H * D) + column[None, :]
    gl.store(target + base * D + offset, sums.to(target.dtype.element_ty), mask=(local < count)[:, None])
