"""Online top-k selection on Hopper (sm_90): selection.py in Gluon.

A unit is two tiles of 128 (token, head of the group) pairs, one for each of two warpgroups. A warp of its own copies a
unit's queries, then its keys into a ring of STAGES slots. The two warpgroups take the products, keys as rows, sum the
probabilities over the group, and hand sums [token, WINDOWS] to a third one, which keeps the lists of the unit's tokens
while they go on.

In the loop that puts candidates into the lists each warp of the third goes round as often as its own tokens need
(`_any`). That is sound while nothing in there makes warps wait for others: its reductions are within a warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import LOG2E, arrive, as_columns, as_rows, copy_rows, product_layout

WARPS = gl.constexpr(4)  # of a warpgroup
ROWS = gl.constexpr(128)  # (token, head of the group) pairs of a warpgroup
GROUPS = gl.constexpr(2)  # warpgroups that multiply
UNIT = gl.constexpr(256)  # rows of both
KEYS = gl.constexpr(64)  # of a slot
PARTS = gl.constexpr(4)  # slots in a chunk
WINDOWS = gl.constexpr(256)  # of a chunk
CHUNKS = gl.constexpr(2)  # of sums, in shared memory
SCORES = gl.constexpr(product_layout(128))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES.value))
KEPT = gl.constexpr(0x7FFFFFFF)  # rank of an entry that nothing displaces
NONE = gl.constexpr(0x40000000)  # blocks from here on stand for an empty place in the list


@gluon.constexpr_function
def _lanes(tokens, warps):
    """All tokens in every warp."""
    return gl.BlockedLayout([max(1, tokens // 32)], [32], [warps], [0])


@gluon.constexpr_function
def _by_token(tokens, columns):
    """[tokens, columns]: tokens across warps, then registers; columns across lanes, then registers."""
    bits = max(tokens, WARPS.value).bit_length() - 1
    token = [[1 << i, 0] if 1 << i < tokens else [0, 0] for i in range(bits)]
    registers = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)] + token[2:]
    lanes = [[0, 1 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, token[:2], [], [tokens, columns])


@gluon.jit
def _place(unit, H: gl.constexpr, B: gl.constexpr, TILES: gl.constexpr):
    """The tile, head and row of the batch of a unit; late tokens, which see most, first."""
    return TILES - 1 - unit // (H * B), unit % H, unit // H % B


@gluon.jit
def _limits(room, own, INIT: gl.constexpr, LOCAL: gl.constexpr):
    """Of tokens with room for so many blocks: how many local ones and forced ones in all, whether all blocks fit, and
    the block before which candidates are, from INIT on."""
    near = gl.minimum(own + 1, LOCAL)
    forced = near + gl.minimum(own + 1 - near, INIT)
    all_fit = own < room
    return near, forced, all_fit, gl.where(all_fit | (forced >= room), 0, own + 1 - LOCAL)


@gluon.jit
def _unit(
    unit, count, segment_start, own_block, key_begin, T: gl.constexpr, H: gl.constexpr, G: gl.constexpr,
    B: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, TILES: gl.constexpr, PARTITION: gl.constexpr,
):  # fmt: skip
    """Of a unit's tokens: their segment's first window, the block before which candidates are, and the segment's start
    where there are any, T where not; PARTITION: warps that ask, each of which gets all."""
    TOKENS: gl.constexpr = UNIT // G
    tile, head, row = _place(unit, H, B, TILES)
    token = tile * TOKENS + gl.arange(0, TOKENS, layout=_lanes(TOKENS, PARTITION))
    real = token < T
    place = row.to(gl.int64) * T + token
    room = gl.load(count + place * H + head, mask=real, other=0)
    own = gl.load(own_block + place, mask=real, other=0)
    start = gl.load(segment_start + place, mask=real, other=0)
    begin = gl.load(key_begin + place, mask=real, other=0)
    _, _, _, stop = _limits(room, own, INIT, LOCAL)
    return begin, stop, gl.where(stop > INIT, start, T)


@gluon.jit
def _segment(segment, waiting, begin, stop):
    """Of the tokens that wait for this segment: its first window and the largest block that is not scored."""
    mine = waiting == segment
    return gl.max(gl.where(mine, begin, 0), 0), gl.max(gl.where(mine, stop, 0), 0)


@gluon.jit
def _copy(
    query, key, count, segment_start, own_block, key_begin, queries, keys, rows_full, rows_empty, full, empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, B: gl.constexpr, SHARE: gl.constexpr,
    INIT: gl.constexpr, LOCAL: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    done = 0
    n = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = _place(unit, H, B, TILES)
        begin, stop, waiting = _unit(
            unit, count, segment_start, own_block, key_begin, T, H, G, B, INIT, LOCAL, TILES, 1
        )
        buffer = done % 2
        mbarrier.wait(rows_empty.index(buffer), ((done // 2) & 1) ^ 1)
        mbarrier.expect(rows_full.index(buffer), 2 * UNIT * K)
        for group in gl.static_range(GROUPS):
            copy_rows(
                query, queries.index(buffer * GROUPS + group), rows_full.index(buffer), row,
                tile * UNIT + group * ROWS, head, G, K, ROWS,
            )  # fmt: skip
        done += 1
        segment = gl.min(waiting, 0)
        while segment < T:
            first, last = _segment(segment, waiting, begin, stop)
            for i in range((last * SHARE + KEYS - 1) // KEYS):
                slot = n % STAGES
                mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), 2 * KEYS * K)
                tma.async_load(key, [row, first + i * KEYS, head * K], full.index(slot), keys.index(slot))
                n += 1
            waiting = gl.where(waiting == segment, T, waiting)
            segment = gl.min(waiting, 0)


@gluon.jit
def _over_group(score, row_lse, FACTOR: gl.constexpr, TOKENS: gl.constexpr, G: gl.constexpr):
    """Score [KEYS, ROWS] to the probability of each window, summed over the heads of the group, [KEYS, TOKENS]."""
    p = gl.exp2(score * FACTOR - row_lse[None, :])
    return gl.sum(gl.reshape(p, [KEYS, TOKENS, G]), 2)


@gluon.jit
def _address(memory):
    """Where a tile lies in shared memory, in bytes."""
    return gl.inline_asm("mov.u32 $0, $1;", "=r,r", [memory], gl.int32)


@gluon.constexpr_function
def _store_each(outputs, inputs):
    return "\n".join(f"st.shared.f32 [{at}], {x};" for at, x in zip(*inputs, strict=True))


@gluon.jit
def _hand_over(
    score, i, seen, row_lse, sums, sums_full, sums_empty, chunk, is_last, GROUP: gl.constexpr, FACTOR: gl.constexpr,
    TOKENS: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Gives the sums of step i to the keepers of the lists; the number of the chunk to go on with."""
    p = _over_group(score, row_lse, FACTOR, TOKENS, G)
    local = gl.arange(0, KEYS, layout=gl.SliceLayout(1, p.type.layout))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, p.type.layout))
    p = gl.where((i * KEYS + local)[:, None] < seen[None, :], p, 0.0)
    part = i % PARTS
    slot = chunk % CHUNKS
    if part == 0:
        mbarrier.wait(sums_empty.index(slot), ((chunk // CHUNKS) & 1) ^ 1)
    at = (slot * GROUPS + GROUP) * TOKENS * WINDOWS + part * KEYS
    at = _address(sums) + 4 * (at + token[None, :] * WINDOWS + local[:, None])
    gl.inline_asm(_store_each, ("r", "f"), [at, p])
    if is_last | (part == PARTS - 1):
        arrive(sums_full.index(slot))
        chunk += 1
    return chunk


@gluon.jit
def _score(
    lse, count, segment_start, own_block, key_begin, key_end, queries, keys, sums, rows_full, rows_empty, full, empty,
    sums_full, sums_empty, GROUP: gl.constexpr,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, B: gl.constexpr, SCALE: gl.constexpr,
    SHARE: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The products and probabilities of a warpgroup."""
    TOKENS: gl.constexpr = ROWS // G
    FACTOR: gl.constexpr = SCALE * LOG2E
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    column = gl.arange(0, ROWS, layout=COLUMN)
    BY_KEY: gl.constexpr = gl.sum(gl.reshape(nothing, [KEYS, TOKENS, G]), 2).type.layout
    local = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, BY_KEY))
    done = 0
    n = 0
    chunk = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = _place(unit, H, B, TILES)
        begin, stop, waiting = _unit(
            unit, count, segment_start, own_block, key_begin, T, H, G, B, INIT, LOCAL, TILES, WARPS
        )
        at = tile * GROUPS * TOKENS + GROUP * TOKENS
        base = row.to(gl.int64) * T + at
        row_lse = gl.load(
            lse + (base * H + head) * G + (column // G * (H * G) + column % G), mask=at + column // G < T,
            other=float("inf"),
        ) * LOG2E  # fmt: skip
        seen = gl.load(key_end + base + local, mask=at + local < T, other=0)
        seen -= gl.load(key_begin + base + local, mask=at + local < T, other=0)
        buffer = done % 2
        mbarrier.wait(rows_full.index(buffer), (done // 2) & 1)
        q = as_columns(queries.index(buffer * GROUPS + GROUP), ROWS, K)
        segment = gl.min(waiting, 0)
        while segment < T:
            first, last = _segment(segment, waiting, begin, stop)
            steps = (last * SHARE + KEYS - 1) // KEYS
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            score = warpgroup_mma(as_rows(keys.index(slot), KEYS, K), q, nothing, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            arrive(empty.index(slot))
            n += 1
            for i in range(1, steps):
                slot = n % STAGES
                mbarrier.wait(full.index(slot), (n // STAGES) & 1)
                ahead = warpgroup_mma(as_rows(keys.index(slot), KEYS, K), q, nothing, use_acc=False, is_async=True)
                chunk = _hand_over(
                    score, i - 1, seen, row_lse, sums, sums_full, sums_empty, chunk, False, GROUP, FACTOR, TOKENS, G
                )
                score = warpgroup_mma_wait(0, deps=[ahead])
                arrive(empty.index(slot))
                n += 1
            chunk = _hand_over(
                score, steps - 1, seen, row_lse, sums, sums_full, sums_empty, chunk, True, GROUP, FACTOR, TOKENS, G
            )
            waiting = gl.where(waiting == segment, T, waiting)
            segment = gl.min(waiting, 0)
        arrive(rows_empty.index(buffer))
        done += 1


@gluon.constexpr_function
def _load_each(outputs, inputs):
    return "\n".join(f"ld.shared.f32 {x}, [{at}];" for x, at in zip(outputs[0], inputs[0], strict=True))


@gluon.jit
def _window(base, token, window):
    """The sums of a chunk's windows [TOKENS, N], each the token's own, where `window` [1|TOKENS, N] tells which."""
    at = base + 4 * (token * WINDOWS + gl.maximum(window, 0))
    return gl.inline_asm(_load_each, ("=f", "r"), [at], gl.distributed_type(gl.float32, at.type.shape, at.type.layout))


@gluon.jit
def _to_next(base, token, block, SHARE: gl.constexpr, REACH: gl.constexpr):
    """What the windows of a chunk's blocks give to the blocks after them."""
    total = 0.0
    for i in gl.static_range(SHARE - REACH + 1, SHARE):
        total += (i + REACH - SHARE) * _window(base, token, block * SHARE + i)
    return total


@gluon.jit
def _importance(base, token, block, carry, SHARE: gl.constexpr, REACH: gl.constexpr):
    """[TOKENS, N]: of a chunk's blocks. A block is SHARE strides, a window REACH: the i-th window of a block shares
    min(REACH, SHARE - i) of them with it, the rest with the next block. carry: what the chunk before gives."""
    total = min(REACH, SHARE) * _window(base, token, block * SHARE)
    for i in gl.static_range(1, SHARE):
        total += min(REACH, SHARE - i) * _window(base, token, block * SHARE + i)
    if REACH > 1:
        total += gl.where(block == 0, carry, _to_next(base, token, block - 1, SHARE, REACH))
    return total


@gluon.constexpr_function
def _or_all(outputs, inputs):
    return "\n".join([f"mov.u32 {outputs[0][0]}, 0;", *(f"or.b32 {outputs[0][0]}, {outputs[0][0]}, {x};" for x in inputs[0])])


@gluon.jit
def _any(x):
    """Whether any of the integers x that this warp holds, the same in all lanes, is not 0: differs by warp."""
    return gl.inline_asm(_or_all, ("=&r", "r"), [x], gl.int32) != 0


@gluon.jit
def _compare(rank, list_rank):
    """The best candidate and the worst in the list, [TOKENS], and whether any of this warp's candidates is better."""
    worst = gl.min(list_rank, 1)
    best = gl.convert_layout(gl.max(rank, 1), worst.type.layout, assert_trivial=True)
    return best, worst, _any((best > worst).to(gl.int32))


@gluon.jit
def _column(x, like):
    """x [TOKENS] as a column beside `like`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _insert(rank, block, list_rank, list_block):
    """The list after a chunk of candidates, all [TOKENS, N]: `rank` (negative: none) of `block`.

    Of equal ranks the smaller block stays; chunks come in ascending order.
    """
    best, worst, more = _compare(rank, list_rank)
    while more:
        chosen = gl.min(gl.where(rank == _column(best, rank), block, NONE), 1)
        evicted = gl.max(gl.where(list_rank == worst[:, None], list_block, -1), 1)
        place = (best > worst)[:, None] & (list_block == evicted[:, None])
        list_rank = gl.where(place, best[:, None], list_rank)
        list_block = gl.where(place, _column(chosen, list_block), list_block)
        rank = gl.where(block == chosen[:, None], -1, rank)
        best, worst, more = _compare(rank, list_rank)
    return list_rank, list_block


@gluon.jit
def _keep(
    count, segment_start, own_block, key_begin, block_indices, sums, sums_full, sums_empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, B: gl.constexpr, S: gl.constexpr, SHARE: gl.constexpr,
    REACH: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, LIST: gl.constexpr, TILES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The lists of the unit's tokens."""
    TOKENS: gl.constexpr = UNIT // G
    BLOCKS: gl.constexpr = WINDOWS // SHARE
    LISTS: gl.constexpr = _by_token(TOKENS, LIST)
    CANDIDATES: gl.constexpr = _by_token(TOKENS, BLOCKS)
    local = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LISTS))
    entry = gl.arange(0, LIST, layout=gl.SliceLayout(0, LISTS))[None, :]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, CANDIDATES))[:, None]
    column = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, CANDIDATES))[None, :]
    chunk = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = _place(unit, H, B, TILES)
        begin, stop, waiting = _unit(
            unit, count, segment_start, own_block, key_begin, T, H, G, B, INIT, LOCAL, TILES, WARPS
        )
        inside = tile * TOKENS + local < T
        place = row.to(gl.int64) * T + tile * TOKENS + local
        room = gl.load(count + place * H + head, mask=inside, other=0)
        own = gl.load(own_block + place, mask=inside, other=0)
        start = gl.load(segment_start + place, mask=inside, other=0)
        near, forced, all_fit, own_stop = _limits(room, own, INIT, LOCAL)
        fixed = entry < gl.where(all_fit, own + 1, gl.minimum(forced, room))[:, None]
        by_priority = gl.where(entry < near[:, None], own[:, None] - entry, entry - near[:, None])
        list_block = gl.where(fixed, gl.where(all_fit[:, None], entry, by_priority), NONE + entry)
        list_rank = gl.where(fixed | (entry >= room[:, None]), KEPT, -1)  # [TOKENS, LIST]
        segment = gl.min(waiting, 0)
        while segment < T:
            _, last = _segment(segment, waiting, begin, stop)
            before = gl.where(start == segment, own_stop, 0)
            carry = gl.full([TOKENS], 0.0, gl.float32, gl.SliceLayout(1, CANDIDATES))[:, None]
            for first in range(0, last, BLOCKS):
                slot = chunk % CHUNKS
                mbarrier.wait(sums_full.index(slot), (chunk // CHUNKS) & 1)
                base = _address(sums) + slot * (4 * TOKENS * WINDOWS)
                importance = _importance(base, token, column, carry, SHARE, REACH)
                if REACH > 1:
                    carry = _to_next(base, token, gl.full([1], BLOCKS - 1, gl.int32, gl.SliceLayout(0, CANDIDATES))[None, :], SHARE, REACH)
                arrive(sums_empty.index(slot))
                chunk += 1
                block = first + column
                candidate = (block >= INIT) & (block < _column(before, importance))
                rank = gl.where(candidate, importance.to(gl.int32, bitcast=True), -1)
                list_rank, list_block = _insert(rank, block, list_rank, list_block)
            waiting = gl.where(waiting == segment, T, waiting)
            segment = gl.min(waiting, 0)

        chosen = gl.full([TOKENS, LIST], -1, gl.int32, LISTS)
        for i in range(S):
            smallest = gl.min(list_block, 1)[:, None]
            chosen = gl.where((entry == i) & (smallest < NONE), smallest, chosen)
            list_block = gl.where(list_block == smallest, KEPT, list_block)
        pointers = block_indices + (place * H + head)[:, None] * S + entry
        gl.store(pointers, chosen, mask=inside[:, None] & (entry < S))


@gluon.jit
def select(
    query, compressed_key, lse, count, segment_start, own_block, key_begin, key_end, block_indices,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, B: gl.constexpr, S: gl.constexpr,
    SCALE: gl.constexpr, SHARE: gl.constexpr, REACH: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr,
    LIST: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """block_indices int32 [B, T, H, S], as selection.py gives them. Grid: PROGRAMS."""
    queries = gl.allocate_shared_memory(query.dtype, [2 * GROUPS, ROWS, K], gl.NVMMASharedLayout(128, 16, 2))
    keys = gl.allocate_shared_memory(compressed_key.dtype, [STAGES, 1, KEYS, K], compressed_key.layout)
    sums = gl.allocate_shared_memory(
        gl.float32, [CHUNKS * UNIT // G * WINDOWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    rows_full = mbarrier.allocate_mbarrier(batch=2)
    rows_empty = mbarrier.allocate_mbarrier(batch=2)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    sums_full = mbarrier.allocate_mbarrier(batch=CHUNKS)
    sums_empty = mbarrier.allocate_mbarrier(batch=CHUNKS)
    for i in gl.static_range(2):
        mbarrier.init(rows_full.index(i), count=1)
        mbarrier.init(rows_empty.index(i), count=GROUPS * WARPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS * WARPS)
    for i in gl.static_range(CHUNKS):
        mbarrier.init(sums_full.index(i), count=GROUPS * WARPS)
        mbarrier.init(sums_empty.index(i), count=WARPS)
    fence_async_shared()
    gl.barrier()
    gl.warp_specialize(
        [
            (_score, (
                lse, count, segment_start, own_block, key_begin, key_end, queries, keys, sums, rows_full, rows_empty,
                full, empty, sums_full, sums_empty, 0,
                T, H, G, K, B, SCALE, SHARE, INIT, LOCAL, TILES, PROGRAMS, STAGES,
            )),
            (_score, (
                lse, count, segment_start, own_block, key_begin, key_end, queries, keys, sums, rows_full, rows_empty,
                full, empty, sums_full, sums_empty, 1,
                T, H, G, K, B, SCALE, SHARE, INIT, LOCAL, TILES, PROGRAMS, STAGES,
            )),
            (_keep, (
                count, segment_start, own_block, key_begin, block_indices, sums, sums_full, sums_empty,
                T, H, G, B, S, SHARE, REACH, INIT, LOCAL, LIST, TILES, PROGRAMS,
            )),
            (_copy, (
                query, compressed_key, count, segment_start, own_block, key_begin, queries, keys, rows_full,
                rows_empty, full, empty, T, H, G, K, B, SHARE, INIT, LOCAL, TILES, PROGRAMS, STAGES,
            )),
        ],
        [4, 4, 1],
        [176, 120, 24],
    )  # fmt: skip
