"""What the passes from the keys' side share on Hopper (sm_90): selected_hopper_keys.py and interval_hopper_keys.py.

A program has 64 keys and a list of slots of 64 rows, a row being a (token, head of the group) pair. One warp copies
queries and cotangents into a ring of STAGES slots; another brings the rows' statistics; one warpgroup multiplies. Keys
are the rows of all four products, so that probabilities go from one to the next in registers. Two programs share a
multiprocessor: one's products run beside the other's exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import LOG2E, arrive, as_columns, as_rows, product_layout

WARPS = gl.constexpr(4)
KEYS = gl.constexpr(64)
ROWS = gl.constexpr(64)
STATISTICS = gl.constexpr(3)  # of a row: lse in base 2, delta, weight
SCORES = gl.constexpr(product_layout(64))
KEY = gl.constexpr(gl.SliceLayout(1, SCORES.value))
ROW = gl.constexpr(gl.SliceLayout(0, SCORES.value))
LANES = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # a slot's rows in one warp


@gluon.jit
def allocate(query, key, value, d_output, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for keys, values and ring, and barriers: keys are there, or done with; a slot is full, or free."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(key.dtype, [1, KEYS, K], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [1, KEYS, V], value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES, ROWS, K], tile)
    cotangents = gl.allocate_shared_memory(d_output.dtype, [STAGES, ROWS, V], tile)
    statistics = gl.allocate_shared_memory(
        gl.float32, [STAGES * STATISTICS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    keys_full = mbarrier.allocate_mbarrier()
    keys_empty = mbarrier.allocate_mbarrier()
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(keys_full, count=1)
    mbarrier.init(keys_empty, count=WARPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # what is copied, and the statistics
        mbarrier.init(empty.index(i), count=WARPS)
    fence_async_shared()
    gl.barrier()
    return keys, values, queries, cotangents, statistics, keys_full, keys_empty, full, empty


@gluon.jit
def bring_statistics(lse, delta, weight, offset, real, statistics, full, empty, n, STAGES: gl.constexpr):
    """Of the rows at `offset`, into the n-th slot; a row that is not real has an infinite lse."""
    row_lse = gl.load(lse + offset, mask=real, other=float("inf")) * LOG2E
    row_delta = gl.load(delta + offset, mask=real, other=0.0)
    row_weight = gl.load(weight + offset, mask=real, other=0.0)
    slot = n % STAGES
    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
    statistics.index(slot * STATISTICS).store(row_lse)
    statistics.index(slot * STATISTICS + 1).store(row_delta)
    statistics.index(slot * STATISTICS + 2).store(row_weight)
    arrive(full.index(slot))


@gluon.jit
def probabilities(
    k, dk, dv, queries, statistics, full, empty, n, is_first, K: gl.constexpr, SCALE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """weight * probability [KEYS, ROWS] of the n-th slot, and dk, dv, of which no product runs any more.

    Unless it is the first one of those keys, the slot before is given back.
    """
    slot = n % STAGES
    mbarrier.wait(full.index(slot), (n // STAGES) & 1)
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    score = warpgroup_mma(k, as_columns(queries.index(slot), ROWS, K), nothing, use_acc=False, is_async=True)
    score, dk, dv = warpgroup_mma_wait(0, deps=[score, dk, dv])
    if not is_first:
        arrive(empty.index((n - 1) % STAGES))
    row_lse = statistics.index(slot * STATISTICS).load(ROW)
    p = gl.exp2(score * (SCALE * LOG2E) - row_lse[None, :])
    return p * statistics.index(slot * STATISTICS + 2).load(ROW)[None, :], dk, dv


@gluon.jit
def add_gradients(
    p, v, dk, dv, queries, cotangents, statistics, n, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr
):
    """dk [KEYS, K], still unscaled, and dv [KEYS, V] with what the n-th slot gives, products still running."""
    of_k: gl.constexpr = product_layout(K)
    of_v: gl.constexpr = product_layout(V)
    dtype: gl.constexpr = queries.dtype
    slot = n % STAGES
    q, do = queries.index(slot), cotangents.index(slot)
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    a = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, of_v, 2), assert_trivial=True)
    dp = warpgroup_mma(v, as_columns(do, ROWS, V), nothing, use_acc=False, is_async=True)
    dv = warpgroup_mma(a, as_rows(do, ROWS, V), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - statistics.index(slot * STATISTICS + 1).load(ROW)[None, :])
    a = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, of_k, 2), assert_trivial=True)
    return warpgroup_mma(a, as_rows(q, ROWS, K), dk, is_async=True), dv


@gluon.jit
def store_keys(target, base, count, sums, H: gl.constexpr, D: gl.constexpr):
    """Stores the first `count` rows of sums [KEYS, D] as every H-th row of target [.., D], from row `base` on."""
    layout: gl.constexpr = product_layout(D)
    local = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    offset = local[:, None] * (H * D) + column[None, :]
    gl.store(target + base * D + offset, sums.to(target.dtype.element_ty), mask=(local < count)[:, None])
