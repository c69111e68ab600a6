"""Online top-k selection on Hopper (sm_90): ../select_blocks.py in Gluon.

A unit is two tiles of 128 query rows, one for each of two warpgroups. A warp of its own copies a unit's queries, then
its keys into a ring, each slot with a note of what it is. The two warpgroups take the products, keys as rows, sum the
probabilities over the group, and hand the sums (window_sums.py) to eight more warps, which keep the lists
(block_ranks.py) of the unit's tokens while they go on. The queries lie so that a thread holds all heads of its tokens,
or at G = 64 half of them (`column_of`): their sum takes no other thread, or one.
"""

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..select_blocks import NONE, NOWHERE, SelectionShape
from .block_ranks import LIST_WARPS, ascending, by_token, insert, numbered, same, start_lists
from .ptx import load_word, shared_address, store_word
from .ring import Ring, allocate_barriers
from .rows import LOG2E, WIDTH, UnitShape, as_columns, as_rows, lanes, place_of, product_layout
from .window_sums import CHUNKS, GROUPS, KEYS, PARTS, ROWS, UNIT, WINDOWS, SumRing, column_of, neighbours

WARPS = gl.constexpr(4)  # a warpgroup's warps
NOTES = gl.constexpr(16)  # at least as many as there are slots
SCORES = gl.constexpr(product_layout(128))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES.value))
FIRST = gl.constexpr(4)  # notes on slots: a unit's first
LAST = gl.constexpr(8)  # a chunk's last
END = gl.constexpr(16)  # none follows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionUnitShape(SelectionShape, UnitShape):
    """What the kernel here has."""

    UNIT = UNIT.value


@gluon.aggregate
class Unit:
    """Which tile of tokens, of which kv head and batch row."""

    tile: gl.tensor
    head: gl.tensor
    row: gl.tensor


@gluon.aggregate
class Queries:
    """What is known of each query: pointers, int32 [B, T], count [B, T, H].

    Attributes:
        count: blocks to take.
        segment_start: place in the key row at which its segment begins.
        own_block: the block of the segment that it stands in.
        key_begin, key_end: the slots of the windows that it sees.
    """

    count: gl.tensor
    segment_start: gl.tensor
    own_block: gl.tensor
    key_begin: gl.tensor
    key_end: gl.tensor

    @gluon.jit
    def waiting(self, unit, shape, PARTITION: gl.constexpr):
        """The segment's first window, the block before which candidates are, and the segment's start where there are
        any, NOWHERE where not: all [TOKENS]. PARTITION: warps that ask, each of which gets all."""
        TOKENS: gl.constexpr = UNIT // shape.G
        token = unit.tile * TOKENS + gl.arange(0, TOKENS, layout=lanes(TOKENS, PARTITION))
        real = token < shape.T
        index = unit.row.to(gl.int64) * shape.T + token
        room = gl.load(self.count + index * shape.H + unit.head, mask=real, other=0)
        own = gl.load(self.own_block + index, mask=real, other=0)
        start = gl.load(self.segment_start + index, mask=real, other=0)
        begin = gl.load(self.key_begin + index, mask=real, other=0)
        _, _, _, stop = _limits(room, own, shape)
        return begin, stop, gl.where(stop > shape.INIT, start, NOWHERE)


@gluon.aggregate
class RowRing(Ring):
    """The query rows of units: queries [STAGES * GROUPS, ROWS, K] and their lse in base 2 [STAGES * GROUPS, ROWS]."""

    queries: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor

    @gluon.jit
    def tile(self, n, GROUP: gl.constexpr):
        """Which tile a warpgroup has of the n-th unit."""
        return n % self.STAGES * GROUPS + GROUP


@gluon.aggregate
class KeyRing(Ring):
    """Keys [STAGES, 1, KEYS, K], and a note [NOTES] on each slot: its part of the chunk, with FIRST, LAST, or END."""

    keys: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor

    @gluon.jit
    def write_note(self, n, note):
        """Notes what the n-th slot is."""
        store_word(shared_address(self.notes) + 4 * self.slot(n), note)

    @gluon.jit
    def note(self, n):
        """Waits for the n-th slot: what there is to know of it."""
        self.wait_full(n)
        return load_word(shared_address(self.notes) + 4 * self.slot(n))


@gluon.jit
def _unit(n, shape):
    """The n-th `Unit`."""
    tile, head, row = place_of(n, shape)
    return Unit(tile, head, row)


@gluon.jit
def _limits(room, own, shape):
    """How many local blocks and forced ones in all tokens have, whether all blocks fit into so much room, and the
    block before which candidates are, from INIT on."""
    near = gl.minimum(own + 1, shape.LOCAL)
    forced = near + gl.minimum(own + 1 - near, shape.INIT)
    all_fit = own < room
    return near, forced, all_fit, gl.where(all_fit | (forced >= room), 0, own + 1 - shape.LOCAL)


@gluon.jit
def _segment(segment, waiting, begin, stop):
    """The first window of a segment, and the block before which candidates of the tokens that wait for it are."""
    mine = waiting == segment
    return gl.max(gl.where(mine, begin, 0), 0), gl.max(gl.where(mine, stop, 0), 0)


@gluon.jit
def _copy_rows(query, tile, barrier, unit, token, shape):
    """Copies the queries of a tile of tokens from `token` on, in the order of `column_of`."""
    G: gl.constexpr = shape.G
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    PIECES: gl.constexpr = ROWS // (TOKENS * G)
    pieces = tile.reinterpret(
        query.dtype, [shape.K // WIDTH * PIECES, 1, G // HEADS, TOKENS, HEADS, WIDTH], query.layout
    )
    for i in gl.static_range(shape.K // WIDTH):
        for j in gl.static_range(PIECES):
            at = [unit.row, unit.head * (G // HEADS), token + j * TOKENS, 0, i * WIDTH]
            tma.async_load(query, at, barrier, pieces.index(i * PIECES + j))


@gluon.jit
def _copy_unit(query, lse, rows, n, unit, shape):
    """Copies the queries of a unit and their lse as the n-th unit of the program."""
    G: gl.constexpr = shape.G
    rows.wait_empty(n)
    barrier = rows.expect(n, 2 * UNIT * shape.K)
    for group in gl.static_range(GROUPS):
        token = (unit.tile * GROUPS + group) * (ROWS // G)
        _copy_rows(query, rows.queries.index(rows.tile(n, group)), barrier, unit, token, shape)
        local, of_group = column_of(gl.arange(0, ROWS, layout=lanes(ROWS, 1)), G)
        index = unit.row.to(gl.int64) * shape.T + token + local
        real = token + local < shape.T
        row_lse = gl.load(lse + (index * shape.H + unit.head) * G + of_group, mask=real, other=float("inf"))
        rows.lse.index(rows.tile(n, group)).store(row_lse * LOG2E)
    rows.fill(n)


@gluon.jit
def _copy(query, key, lse, queries, rows, keys, shape):
    """The copying warp. It copies the queries of each unit that has candidates, then the keys of its windows."""
    done = 0
    n = 0
    for i in range(gl.program_id(0), shape.UNITS, shape.PROGRAMS):
        unit = _unit(i, shape)
        begin, stop, waiting = queries.waiting(unit, shape, 1)
        segment = gl.min(waiting, 0)
        if segment < NOWHERE:
            _copy_unit(query, lse, rows, done, unit, shape)
            done += 1
            note = gl.to_tensor(FIRST)
            while segment < NOWHERE:
                first, last = _segment(segment, waiting, begin, stop)
                steps = (last * shape.BLOCK_STRIDES + KEYS - 1) // KEYS
                for j in range(steps):
                    keys.wait_empty(n)
                    ends = (j % PARTS == PARTS - 1) | (j == steps - 1)
                    keys.write_note(n, j % PARTS + gl.where(ends, LAST, 0) + note)
                    barrier = keys.expect(n, 2 * KEYS * shape.K)
                    at = [unit.row, first + j * KEYS, unit.head * shape.K]
                    tma.async_load(key, at, barrier, keys.keys.index(keys.slot(n)))
                    note = 0
                    n += 1
                waiting = gl.where(waiting == segment, NOWHERE, waiting)
                segment = gl.min(waiting, 0)
    keys.wait_empty(n)
    keys.write_note(n, END)
    keys.fill(n)


@gluon.jit
def _product(n, done, rows, keys, shape, GROUP: gl.constexpr):
    """The score [KEYS, ROWS] of the n-th slot with the queries of unit number `done`, still running."""
    nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, SCORES)
    q = as_columns(rows.queries.index(rows.tile(done, GROUP)), ROWS, shape.K)
    k = as_rows(keys.keys.index(keys.slot(n)), KEYS, shape.K)
    return warpgroup_mma(k, q, nothing, use_acc=False, is_async=True)


@gluon.jit
def _score_on(score, note, n, done, chunk, row_lse, rows, keys, sums, shape, GROUP: gl.constexpr):
    """Hands over the n-th slot's score, while the product of the slot after it runs: that one's score, and so on."""
    ahead = keys.note(n + 1)
    next_unit = ahead & FIRST != 0
    if next_unit:
        done += 1
        rows.wait_full(done)
    # after the last slot nobody reads the product
    product = _product(n + 1, done, rows, keys, shape, GROUP)
    part = note % PARTS
    chunk = sums.hand_over(score, row_lse, part, note & LAST != 0, chunk, GROUP, shape.SCALE * LOG2E, shape.G)
    product = warpgroup_mma_wait(0, deps=[product])
    keys.release(n + 1)
    if next_unit:
        rows.release(done + 1)  # the unit before: there are two slots
        row_lse = rows.lse.index(rows.tile(done, GROUP)).load(COLUMN)
    return product, ahead, n + 1, done, chunk, row_lse


@gluon.jit
def _score(rows, keys, sums, shape, GROUP: gl.constexpr):
    """The products and probabilities of a warpgroup."""
    note = keys.note(0)
    if note < END:
        rows.wait_full(0)
        row_lse = rows.lse.index(GROUP).load(COLUMN)
        score = _product(0, 0, rows, keys, shape, GROUP)
        score = warpgroup_mma_wait(0, deps=[score])
        keys.release(0)
        n = 0
        done = 0
        chunk = 0
        while note < END:
            # twice, so that no score moves from registers to registers
            other, note, n, done, chunk, row_lse = _score_on(
                score, note, n, done, chunk, row_lse, rows, keys, sums, shape, GROUP
            )
            if note < END:
                score, note, n, done, chunk, row_lse = _score_on(
                    other, note, n, done, chunk, row_lse, rows, keys, sums, shape, GROUP
                )


@gluon.jit
def _keep(queries, block_indices, sums, shape):
    """The lists of the unit's tokens."""
    LIST: gl.constexpr = shape.LIST
    TOKENS: gl.constexpr = UNIT // shape.G
    BLOCKS: gl.constexpr = WINDOWS // shape.BLOCK_STRIDES
    LISTS: gl.constexpr = by_token(TOKENS, LIST // 32)
    CANDIDATES: gl.constexpr = by_token(TOKENS, BLOCKS // 32)
    TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LISTS))
    local = gl.arange(0, TOKENS, layout=TOKEN)
    token = same(local[:, None, None], CANDIDATES)
    entry = numbered(LIST, LISTS)
    column = numbered(BLOCKS, CANDIDATES)
    last_of_chunk = gl.full([1, 1, 1], BLOCKS - 1, gl.int32, CANDIDATES)
    # with two local blocks a window of a block before them ends before the query
    HIDE: gl.constexpr = shape.WINDOW_STRIDES > 1 and shape.LOCAL < 2
    n = 0
    for i in range(gl.program_id(0), shape.UNITS, shape.PROGRAMS):
        unit = _unit(i, shape)
        begin, stop, waiting = queries.waiting(unit, shape, LIST_WARPS)
        inside = unit.tile * TOKENS + local < shape.T
        index = unit.row.to(gl.int64) * shape.T + unit.tile * TOKENS + local
        room = gl.load(queries.count + index * shape.H + unit.head, mask=inside, other=0)
        own = gl.load(queries.own_block + index, mask=inside, other=0)
        start = gl.load(queries.segment_start + index, mask=inside, other=0)
        seen = gl.load(queries.key_end + index, mask=inside, other=0)
        seen -= gl.load(queries.key_begin + index, mask=inside, other=0)
        near, forced, all_fit, own_stop = _limits(room, own, shape)
        list_rank, list_block = start_lists(room, own, near, forced, all_fit, entry)  # [TOKENS, LIST / 32, 32]
        seen = same(seen[:, None, None], CANDIDATES)
        segment = gl.min(waiting, 0)
        while segment < NOWHERE:
            _, last = _segment(segment, waiting, begin, stop)
            before = same(gl.where(start == segment, own_stop, 0)[:, None, None], CANDIDATES)
            carry = gl.zeros_like(seen).to(gl.float32)
            for first in range(0, last, BLOCKS):
                chunk = sums.chunk(n, token, seen - first * shape.BLOCK_STRIDES, shape.G, HIDE)
                importance = chunk.importance(column, carry, shape)
                if shape.WINDOW_STRIDES > 1:
                    carry = chunk.to_next(last_of_chunk, shape)
                sums.release(n)
                n += 1
                block = first + column
                rank = gl.maximum(importance, 0.0).to(gl.int32, bitcast=True)  # NaN gives 0
                rank = gl.where((block >= shape.INIT) & (block < before), rank, -1)
                list_rank, list_block = insert(rank, block, list_rank, list_block)
            waiting = gl.where(waiting == segment, NOWHERE, waiting)
            segment = gl.min(waiting, 0)

        target = ascending(list_block, entry, TOKENS, LIST)
        pointers = block_indices + (index * shape.H + unit.head)[:, None, None] * shape.S + target
        chosen = gl.where(list_block < NONE, list_block, -1)
        gl.store(pointers, chosen, mask=inside[:, None, None] & (target < shape.S))


@gluon.jit
def _allocate(query, key, shape):
    """The `RowRing`, the `KeyRing` and the `SumRing` of a program."""
    STAGES: gl.constexpr = shape.STAGES
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(query.dtype, [2 * GROUPS, ROWS, shape.K], tile)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, KEYS, shape.K], key.layout)
    sums = gl.allocate_shared_memory(gl.float32, [CHUNKS * UNIT // shape.G * WINDOWS], plain)
    lse = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, ROWS], plain)
    notes = gl.allocate_shared_memory(gl.int32, [NOTES], plain)
    rows_full, rows_empty = allocate_barriers(2, 2, GROUPS * WARPS)  # filled by the copies and by the lse
    keys_full, keys_empty = allocate_barriers(STAGES, 1, GROUPS * WARPS)
    sums_full, sums_empty = allocate_barriers(CHUNKS, GROUPS * WARPS, LIST_WARPS)
    fence_async_shared()
    gl.barrier()
    rows = RowRing(rows_full, rows_empty, 2, queries, lse)
    return rows, KeyRing(keys_full, keys_empty, STAGES, keys, notes), SumRing(sums_full, sums_empty, CHUNKS, sums)


@gluon.jit
def select(
    query,
    compressed_key,
    lse,
    count,
    segment_start,
    own_block,
    key_begin,
    key_end,
    block_indices,
    SHAPE: gl.constexpr,
):
    """block_indices int32 [B, T, H, S], as ../select_blocks.py gives them. Grid: PROGRAMS.

    SHAPE is a `SelectionUnitShape`.
    """
    queries = Queries(count, segment_start, own_block, key_begin, key_end)
    rows, keys, sums = _allocate(query, compressed_key, SHAPE)
    gl.warp_specialize(
        [
            (_score, (rows, keys, sums, SHAPE, 0)),
            (_score, (rows, keys, sums, SHAPE, 1)),
            (_keep, (queries, block_indices, sums, SHAPE)),
            (_copy, (query, compressed_key, lse, queries, rows, keys, SHAPE)),
        ],
        [4, 8, 1],
        [136, 96, 24],
    )
