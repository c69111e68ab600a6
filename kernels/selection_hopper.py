"""Online top-k selection on Hopper (sm_90): selection.py in Gluon.

A unit is two tiles of 128 (token, head of the group) pairs, one for each of two warpgroups. A warp of its own copies a
unit's queries, then its keys into a ring of STAGES slots, each with a note of what it is. The two warpgroups take the
products, keys as rows, sum the probabilities over the group, and hand sums [token, WINDOWS] to eight more warps, which
keep the lists of the unit's tokens while they go on. The queries lie so that a thread holds all heads of its tokens, or
at G = 64 half of them (`_column_of`): their sum takes no other thread, or one.
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

from .hopper import LOG2E, WIDTH, arrive, as_columns, as_rows, lanes, place_of, product_layout
from .selection_hopper_lists import LIST_WARPS, NONE, ascending, by_token, insert, places, same, start_lists

WARPS = gl.constexpr(4)  # of a warpgroup
ROWS = gl.constexpr(128)  # (token, head of the group) pairs of a warpgroup
GROUPS = gl.constexpr(2)  # warpgroups that multiply
UNIT = gl.constexpr(256)  # rows of both
KEYS = gl.constexpr(64)  # of a slot
PARTS = gl.constexpr(4)  # slots in a chunk
WINDOWS = gl.constexpr(256)  # of a chunk
NOTES = gl.constexpr(16)  # at least as many as there are slots
CHUNKS = gl.constexpr(2)  # of sums, in shared memory
SCORES = gl.constexpr(product_layout(128))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES.value))
FIRST = gl.constexpr(4)  # notes on slots: a unit's first
LAST = gl.constexpr(8)  # a chunk's last
END = gl.constexpr(16)  # none follows


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
    tile, head, row, count, segment_start, own_block, key_begin, T: gl.constexpr, H: gl.constexpr, G: gl.constexpr,
    INIT: gl.constexpr, LOCAL: gl.constexpr, PARTITION: gl.constexpr,
):  # fmt: skip
    """Of a unit's tokens: their segment's first window, the block before which candidates are, and the segment's start
    where there are any, T where not; PARTITION: warps that ask, each of which gets all."""
    TOKENS: gl.constexpr = UNIT // G
    token = tile * TOKENS + gl.arange(0, TOKENS, layout=lanes(TOKENS, PARTITION))
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
    """Of the tokens that wait for this segment: its first window and the block before which candidates are."""
    mine = waiting == segment
    return gl.max(gl.where(mine, begin, 0), 0), gl.max(gl.where(mine, stop, 0), 0)


@gluon.jit
def _address(memory):
    """Where a tile lies in shared memory, in bytes."""
    return gl.inline_asm("mov.u32 $0, $1;", "=r,r", [memory], gl.int32)


@gluon.jit
def _write_note(notes, slot, note):
    gl.inline_asm(
        "st.shared.u32 [$0], $1; bar.warp.sync 0xffffffff;", "r,r,~{memory}", [_address(notes) + 4 * slot, note]
    )


@gluon.jit
def _note(notes, full, n, STAGES: gl.constexpr):
    """Waits for the n-th slot: what there is to know of it."""
    slot = n % STAGES
    mbarrier.wait(full.index(slot), (n // STAGES) & 1)
    return gl.inline_asm("ld.shared.u32 $0, [$1];", "=r,r,~{memory}", [_address(notes) + 4 * slot], gl.int32)


@gluon.constexpr_function
def neighbours(group):
    """Tokens that lie side by side in a tile's columns, and heads of each that do: eight pairs."""
    tokens = min(4, ROWS.value // group)
    return tokens, 8 // tokens


@gluon.jit
def _column_of(n, G: gl.constexpr):
    """Token and head of the group of a tile's column."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    return n // (TOKENS * G) * TOKENS + n % 8 // HEADS, n % (TOKENS * G) // 8 * HEADS + n % HEADS


@gluon.jit
def _copy_rows(query, tile, barrier, row, token, head, G: gl.constexpr, K: gl.constexpr):
    """The queries of a tile of tokens from `token` on, in the order of `_column_of`."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    PIECES: gl.constexpr = ROWS // (TOKENS * G)
    parts = tile.reinterpret(query.dtype, [K // WIDTH * PIECES, 1, G // HEADS, TOKENS, HEADS, WIDTH], query.layout)
    for part in gl.static_range(K // WIDTH):
        for piece in gl.static_range(PIECES):
            tma.async_load(
                query, [row, head * (G // HEADS), token + piece * TOKENS, 0, part * WIDTH], barrier,
                parts.index(part * PIECES + piece),
            )  # fmt: skip


@gluon.jit
def _copy(
    query, key, lse, count, segment_start, own_block, key_begin, queries, keys, statistics, notes, rows_full,
    rows_empty, full, empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, B: gl.constexpr, SHARE: gl.constexpr,
    INIT: gl.constexpr, LOCAL: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: of each unit that has candidates the queries and the lse in base 2, then its windows' keys."""
    done = 0
    n = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = place_of(unit, H, B, TILES)
        begin, stop, waiting = _unit(
            tile, head, row, count, segment_start, own_block, key_begin, T, H, G, INIT, LOCAL, 1
        )
        segment = gl.min(waiting, 0)
        if segment < T:
            buffer = done % 2
            mbarrier.wait(rows_empty.index(buffer), ((done // 2) & 1) ^ 1)
            mbarrier.expect(rows_full.index(buffer), 2 * UNIT * K)
            for group in gl.static_range(GROUPS):
                token = (tile * GROUPS + group) * (ROWS // G)
                tile_of_rows = buffer * GROUPS + group
                _copy_rows(query, queries.index(tile_of_rows), rows_full.index(buffer), row, token, head, G, K)
                local, of_group = _column_of(gl.arange(0, ROWS, layout=lanes(ROWS, 1)), G)
                place = row.to(gl.int64) * T + token + local
                row_lse = gl.load(lse + (place * H + head) * G + of_group, mask=token + local < T, other=float("inf"))
                statistics.index(tile_of_rows).store(row_lse * LOG2E)
            arrive(rows_full.index(buffer))
            done += 1
            note = gl.to_tensor(FIRST)
            while segment < T:
                first, last = _segment(segment, waiting, begin, stop)
                steps = (last * SHARE + KEYS - 1) // KEYS
                for i in range(steps):
                    slot = n % STAGES
                    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
                    ends = (i % PARTS == PARTS - 1) | (i == steps - 1)
                    _write_note(notes, slot, i % PARTS + gl.where(ends, LAST, 0) + note)
                    mbarrier.expect(full.index(slot), 2 * KEYS * K)
                    tma.async_load(key, [row, first + i * KEYS, head * K], full.index(slot), keys.index(slot))
                    note = 0
                    n += 1
                waiting = gl.where(waiting == segment, T, waiting)
                segment = gl.min(waiting, 0)
    slot = n % STAGES
    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
    _write_note(notes, slot, END)
    arrive(full.index(slot))


@gluon.jit
def _over_group(score, row_lse, FACTOR: gl.constexpr, G: gl.constexpr):
    """Score [KEYS, ROWS] to the probability of each window, summed over the heads of the group: [KEYS, M, tokens that
    lie side by side]."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    p = gl.exp2(score * FACTOR - row_lse[None, :])
    return gl.sum(gl.sum(gl.reshape(p, [KEYS, ROWS // (TOKENS * G), G // HEADS, TOKENS, HEADS]), 4), 2)


@gluon.jit
def _sum_place(token, window, G: gl.constexpr):
    """Where a window's sum stands: so that the eight windows of tokens side by side lie in different banks."""
    return token * WINDOWS + (window ^ token % neighbours(G)[0] * 8)


@gluon.constexpr_function
def _store_sums(pieces, tokens):
    """Assembly that stores a thread's sums, of its two keys per piece of tokens; the keys' addresses come first."""
    return "\n".join(
        f"st.shared.f32 [${i % 2}+{4 * WINDOWS.value * tokens * (i // 2)}], ${2 + i};" for i in range(2 * pieces)
    )


@gluon.constexpr_function
def _inputs(addresses, floats):
    """Constraints of assembly that writes floats to memory."""
    return ",".join(["r"] * addresses + ["f"] * floats + ["~{memory}"])


@gluon.jit
def _hand_over(
    score, note, row_lse, sums, sums_full, sums_empty, chunk, GROUP: gl.constexpr, FACTOR: gl.constexpr,
    G: gl.constexpr,
):  # fmt: skip
    """Gives the sums of a slot to the keepers of the lists; the number of the chunk to go on with."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    PIECES: gl.constexpr = ROWS // (TOKENS * G)
    p = _over_group(score, row_lse, FACTOR, G)
    layout: gl.constexpr = gl.SliceLayout(1, p.type.layout)
    local = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    part = note % PARTS
    slot = chunk % CHUNKS
    if part == 0:
        mbarrier.wait(sums_empty.index(slot), ((chunk // CHUNKS) & 1) ^ 1)
    at = (slot * GROUPS + GROUP) * (ROWS // G)
    at = _address(sums) + 4 * _sum_place(at + token[None, :], part * KEYS + local[:, None], G)
    gl.inline_asm(_store_sums(PIECES, TOKENS), _inputs(2, 2 * PIECES), [at, p])
    if note & LAST != 0:
        arrive(sums_full.index(slot))
        chunk += 1
    return chunk


@gluon.jit
def _product(n, done, queries, keys, GROUP: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    """The score [KEYS, ROWS] of the n-th slot with the queries of unit number `done`, still running."""
    slot = n % STAGES
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    q = as_columns(queries.index(done % 2 * GROUPS + GROUP), ROWS, K)
    return warpgroup_mma(as_rows(keys.index(slot), KEYS, K), q, nothing, use_acc=False, is_async=True)


@gluon.jit
def _score_on(
    score, note, n, done, chunk, row_lse, queries, keys, statistics, notes, sums, rows_full, rows_empty, full, empty,
    sums_full, sums_empty, GROUP: gl.constexpr, G: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Hands over the n-th slot's score, while the product of the slot after it runs: that one's score, and so on."""
    ahead = _note(notes, full, n + 1, STAGES)
    next_unit = ahead & FIRST != 0
    if next_unit:
        done += 1
        mbarrier.wait(rows_full.index(done % 2), (done // 2) & 1)
    # after the last slot one that nobody reads
    product = _product(n + 1, done, queries, keys, GROUP, K, STAGES)
    chunk = _hand_over(score, note, row_lse, sums, sums_full, sums_empty, chunk, GROUP, SCALE * LOG2E, G)
    product = warpgroup_mma_wait(0, deps=[product])
    arrive(empty.index((n + 1) % STAGES))
    if next_unit:
        arrive(rows_empty.index((done + 1) % 2))
        row_lse = statistics.index(done % 2 * GROUPS + GROUP).load(COLUMN)
    return product, ahead, n + 1, done, chunk, row_lse


@gluon.jit
def _score(
    queries, keys, statistics, notes, sums, rows_full, rows_empty, full, empty, sums_full, sums_empty,
    GROUP: gl.constexpr, G: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The products and probabilities of a warpgroup."""
    note = _note(notes, full, 0, STAGES)
    if note < END:
        mbarrier.wait(rows_full.index(0), 0)
        row_lse = statistics.index(GROUP).load(COLUMN)
        score = _product(0, 0, queries, keys, GROUP, K, STAGES)
        score = warpgroup_mma_wait(0, deps=[score])
        arrive(empty.index(0))
        n = 0
        done = 0
        chunk = 0
        while note < END:
            # twice, so that no score moves from registers to registers
            other, note, n, done, chunk, row_lse = _score_on(
                score, note, n, done, chunk, row_lse, queries, keys, statistics, notes, sums, rows_full, rows_empty,
                full, empty, sums_full, sums_empty, GROUP, G, K, SCALE, STAGES,
            )  # fmt: skip
            if note < END:
                score, note, n, done, chunk, row_lse = _score_on(
                    other, note, n, done, chunk, row_lse, queries, keys, statistics, notes, sums, rows_full,
                    rows_empty, full, empty, sums_full, sums_empty, GROUP, G, K, SCALE, STAGES,
                )  # fmt: skip


@gluon.constexpr_function
def _load_each(outputs, inputs):
    """Assembly that loads a float from every address."""
    return "\n".join(f"ld.shared.f32 {x}, [{at}];" for x, at in zip(outputs[0], inputs[0], strict=True))


@gluon.jit
def _window(base, token, window, seen, G: gl.constexpr, HIDE: gl.constexpr):
    """The sums of a chunk's windows, all [TOKENS|1, M, 32]; with HIDE 0 for those that are not seen."""
    at = base + 4 * _sum_place(token, gl.maximum(window, 0), G)
    p = gl.inline_asm(_load_each, ("=f", "r"), [at], gl.distributed_type(gl.float32, at.type.shape, at.type.layout))
    return gl.where(window < seen, p, 0.0) if HIDE else p


@gluon.jit
def _to_next(base, token, block, seen, G: gl.constexpr, HIDE: gl.constexpr, SHARE: gl.constexpr, REACH: gl.constexpr):
    """What the windows of a chunk's blocks give to the blocks after them."""
    total = 0.0
    for i in gl.static_range(SHARE - REACH + 1, SHARE):
        total += (i + REACH - SHARE) * _window(base, token, block * SHARE + i, seen, G, HIDE)
    return total


@gluon.jit
def _importance(
    base, token, block, seen, carry, G: gl.constexpr, HIDE: gl.constexpr, SHARE: gl.constexpr, REACH: gl.constexpr
):
    """[TOKENS, M, 32]: of a chunk's blocks. A block is SHARE strides, a window REACH: the i-th window of a block shares
    min(REACH, SHARE - i) of them with it, the rest with the next block. carry: what the chunk before gives."""
    total = min(REACH, SHARE) * _window(base, token, block * SHARE, seen, G, HIDE)
    for i in gl.static_range(1, SHARE):
        total += min(REACH, SHARE - i) * _window(base, token, block * SHARE + i, seen, G, HIDE)
    if REACH > 1:
        total += gl.where(block == 0, carry, _to_next(base, token, block - 1, seen, G, HIDE, SHARE, REACH))
    return total


@gluon.jit
def _keep(
    count, segment_start, own_block, key_begin, key_end, block_indices, sums, sums_full, sums_empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, B: gl.constexpr, S: gl.constexpr, SHARE: gl.constexpr,
    REACH: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, LIST: gl.constexpr, TILES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The lists of the unit's tokens."""
    TOKENS: gl.constexpr = UNIT // G
    BLOCKS: gl.constexpr = WINDOWS // SHARE
    LISTS: gl.constexpr = by_token(TOKENS, LIST // 32)
    CANDIDATES: gl.constexpr = by_token(TOKENS, BLOCKS // 32)
    TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LISTS))
    local = gl.arange(0, TOKENS, layout=TOKEN)
    token = same(local[:, None, None], CANDIDATES)
    entry = places(LIST, LISTS)
    column = places(BLOCKS, CANDIDATES)
    last_of_chunk = gl.full([1, 1, 1], BLOCKS - 1, gl.int32, CANDIDATES)
    # with two local blocks a window of a block before them ends before the query
    HIDE: gl.constexpr = REACH > 1 and LOCAL < 2
    chunk = 0
    for unit in range(gl.program_id(0), TILES * H * B, PROGRAMS):
        tile, head, row = place_of(unit, H, B, TILES)
        begin, stop, waiting = _unit(
            tile, head, row, count, segment_start, own_block, key_begin, T, H, G, INIT, LOCAL, LIST_WARPS
        )
        inside = tile * TOKENS + local < T
        place = row.to(gl.int64) * T + tile * TOKENS + local
        room = gl.load(count + place * H + head, mask=inside, other=0)
        own = gl.load(own_block + place, mask=inside, other=0)
        start = gl.load(segment_start + place, mask=inside, other=0)
        seen = gl.load(key_end + place, mask=inside, other=0) - gl.load(key_begin + place, mask=inside, other=0)
        near, forced, all_fit, own_stop = _limits(room, own, INIT, LOCAL)
        list_rank, list_block = start_lists(room, own, near, forced, all_fit, entry)  # [TOKENS, LIST / 32, 32]
        seen = same(seen[:, None, None], CANDIDATES)
        segment = gl.min(waiting, 0)
        while segment < T:
            _, last = _segment(segment, waiting, begin, stop)
            before = same(gl.where(start == segment, own_stop, 0)[:, None, None], CANDIDATES)
            carry = gl.zeros_like(seen).to(gl.float32)
            for first in range(0, last, BLOCKS):
                slot = chunk % CHUNKS
                mbarrier.wait(sums_full.index(slot), (chunk // CHUNKS) & 1)
                base = _address(sums) + slot * (4 * TOKENS * WINDOWS)
                in_chunk = seen - first * SHARE
                importance = _importance(base, token, column, in_chunk, carry, G, HIDE, SHARE, REACH)
                if REACH > 1:
                    carry = _to_next(base, token, last_of_chunk, in_chunk, G, HIDE, SHARE, REACH)
                arrive(sums_empty.index(slot))
                chunk += 1
                block = first + column
                rank = gl.where((block >= INIT) & (block < before), importance.to(gl.int32, bitcast=True), -1)
                list_rank, list_block = insert(rank, block, list_rank, list_block)
            waiting = gl.where(waiting == segment, T, waiting)
            segment = gl.min(waiting, 0)

        target = ascending(list_block, entry, TOKENS, LIST)
        pointers = block_indices + (place * H + head)[:, None, None] * S + target
        chosen = gl.where(list_block < NONE, list_block, -1)
        gl.store(pointers, chosen, mask=inside[:, None, None] & (target < S))


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
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums = gl.allocate_shared_memory(gl.float32, [CHUNKS * UNIT // G * WINDOWS], plain)
    statistics = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, ROWS], plain)
    notes = gl.allocate_shared_memory(gl.int32, [NOTES], plain)
    rows_full = mbarrier.allocate_mbarrier(batch=2)
    rows_empty = mbarrier.allocate_mbarrier(batch=2)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    sums_full = mbarrier.allocate_mbarrier(batch=CHUNKS)
    sums_empty = mbarrier.allocate_mbarrier(batch=CHUNKS)
    for i in gl.static_range(2):
        mbarrier.init(rows_full.index(i), count=2)  # what is copied, and the statistics
        mbarrier.init(rows_empty.index(i), count=GROUPS * WARPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS * WARPS)
    for i in gl.static_range(CHUNKS):
        mbarrier.init(sums_full.index(i), count=GROUPS * WARPS)
        mbarrier.init(sums_empty.index(i), count=LIST_WARPS)
    fence_async_shared()
    gl.barrier()
    gl.warp_specialize(
        [
            (_score, (
                queries, keys, statistics, notes, sums, rows_full, rows_empty, full, empty, sums_full, sums_empty, 0,
                G, K, SCALE, STAGES,
            )),
            (_score, (
                queries, keys, statistics, notes, sums, rows_full, rows_empty, full, empty, sums_full, sums_empty, 1,
                G, K, SCALE, STAGES,
            )),
            (_keep, (
                count, segment_start, own_block, key_begin, key_end, block_indices, sums, sums_full, sums_empty,
                T, H, G, B, S, SHARE, REACH, INIT, LOCAL, LIST, TILES, PROGRAMS,
            )),
            (_copy, (
                query, compressed_key, lse, count, segment_start, own_block, key_begin, queries, keys, statistics,
                notes, rows_full, rows_empty, full, empty,
                T, H, G, K, B, SHARE, INIT, LOCAL, TILES, PROGRAMS, STAGES,
            )),
        ],
        [4, 8, 1],
        [136, 96, 24],
    )  # fmt: skip
