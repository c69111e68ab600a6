"""Attention to chosen blocks of keys on Hopper (sm_90): the pass of ../selected_keys.py, in Gluon.

See key_pass.py. A program has 64 keys of a block and the tokens of an item (inverse.py), which are gathered.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma_wait

from ..selected_keys import Ends, Items
from .key_pass import (
    KEY,
    KEYS,
    LANES,
    ROW,
    ROWS,
    add_gradients,
    allocate,
    no_gradients,
    probabilities,
    store_keys,
)
from .rows import WIDTH


@gluon.aggregate
class Gradients:
    """Pointers to where results go, see `backward_key_value`."""

    key: gl.tensor
    value: gl.tensor
    key_more: gl.tensor
    value_more: gl.tensor


@gluon.aggregate
class Program:
    """What a program works on: PIECES pieces of a block, of every PROGRAMS-th item of a batch row and head.

    Attributes:
        piece, worker, head, batch: scalars; `worker` is the first item.
        at: where the items of the batch row and head begin.
        items: see `Items`.
    """

    piece: gl.tensor
    worker: gl.tensor
    head: gl.tensor
    batch: gl.tensor
    at: gl.tensor
    items: Items

    @gluon.jit
    def total(self, shape):
        """The items of the batch row and head."""
        return gl.load(self.items.total + self.batch * shape.H + self.head)

    @gluon.jit
    def choosers(self, item, shape):
        """A pointer to an item's choosers, and how many query rows they make."""
        first = gl.load(self.items.first + self.at + item)
        return self.items.choosers + first, gl.load(self.items.count + self.at + item) * shape.G

    @gluon.jit
    def item(self, item, shape):
        """An item's block, its `choosers`, and the first key of this program's piece of the block."""
        block = gl.load(self.items.block + self.at + item)
        choosers, count = self.choosers(item, shape)
        begin = gl.load(self.items.block_begin + self.batch * shape.BLOCKS + block)
        return block, choosers, count, begin + self.piece * KEYS


@gluon.jit
def _program(items, shape):
    """The `Program` of this program."""
    program = gl.program_id(0)
    worker = program // shape.PIECES
    head = worker // shape.PROGRAMS % shape.H
    batch = worker // shape.PROGRAMS // shape.H
    at = (batch * shape.H + head).to(gl.int64) * shape.ITEMS
    return Program(program % shape.PIECES, worker % shape.PROGRAMS, head, batch, at, items)


@gluon.jit
def _copy(query, d_output, key, value, items, tile, rows, shape):
    """The copying warp."""
    G: gl.constexpr = shape.G
    K: gl.constexpr = shape.K
    V: gl.constexpr = shape.V
    PIECE: gl.constexpr = min(G, ROWS)  # rows of one token that are copied at once
    PIECES: gl.constexpr = ROWS // PIECE
    program = _program(items, shape)
    done = 0
    n = 0
    for item in range(program.worker, program.total(shape), shape.PROGRAMS):
        _, choosers, count, first_key = program.item(item, shape)
        tile.wait_empty(done)
        tile.copy(done, key, value, program.batch, first_key, program.head, shape)
        done += 1
        for i in range((count + ROWS - 1) // ROWS):
            q, do, barrier = rows.begin_copy(n, shape)
            q = q.reinterpret(query.dtype, [K // WIDTH * PIECES, 1, 1, PIECE, WIDTH], query.layout)
            do = do.reinterpret(query.dtype, [V // WIDTH * PIECES, 1, 1, PIECE, WIDTH], query.layout)
            for j in gl.static_range(PIECES):
                at = i * ROWS + j * PIECE
                # rows that are not real are read from behind the batch row, as zeros
                token = shape.T
                if at < count:
                    token = gl.load(choosers + at // G) >> 1
                for part in gl.static_range(K // WIDTH):
                    where = [program.batch, token, program.head * G + at % G, part * WIDTH]
                    tma.async_load(query, where, barrier, q.index(part * PIECES + j))
                for part in gl.static_range(V // WIDTH):
                    where = [program.batch, token, program.head * G + at % G, part * WIDTH]
                    tma.async_load(d_output, where, barrier, do.index(part * PIECES + j))
            n += 1


@gluon.jit
def _bring(lse, delta, weight, items, rows, shape):
    """The warp that brings the rows' statistics."""
    G: gl.constexpr = shape.G
    program = _program(items, shape)
    base = (program.batch.to(gl.int64) * shape.T * shape.H + program.head) * G
    n = 0
    for item in range(program.worker, program.total(shape), shape.PROGRAMS):
        choosers, count = program.choosers(item, shape)
        for i in range((count + ROWS - 1) // ROWS):
            row = i * ROWS + gl.arange(0, ROWS, layout=LANES)
            token = gl.load(choosers + row // G, mask=row < count, other=0) >> 1
            if shape.T * shape.H * G >= 2**31:
                token = token.to(gl.int64)
            offset = base + token * (shape.H * G) + row % G
            rows.bring_statistics(n, lse, delta, weight, offset, row < count, shape)
            n += 1


@gluon.jit
def _multiply(place, items, ends, gradients, tile, rows, shape):
    """The multiplying warpgroup."""
    G: gl.constexpr = shape.G
    H: gl.constexpr = shape.H
    BLOCK: gl.constexpr = shape.BLOCK
    program = _program(items, shape)
    head, batch = program.head, program.batch
    done = 0
    n = 0
    for item in range(program.worker, program.total(shape), shape.PROGRAMS):
        block, choosers, count, first_key = program.item(item, shape)
        # a block's choosers are in the order of their places: only the first ones stand in it
        near = gl.load(ends.near + batch * shape.BLOCKS + block) - gl.load(ends.rank + program.at + item)
        dk, dv = no_gradients(shape)
        tile.wait_full(done)
        done += 1
        for i in range((count + ROWS - 1) // ROWS):
            p, dk, dv = probabilities(tile, rows, n, i == 0, dk, dv, shape)
            if i * ROWS < near * G:
                row = i * ROWS + gl.arange(0, ROWS, layout=ROW)
                token = gl.load(choosers + row // G, mask=row < count, other=0) >> 1
                row_place = gl.load(place + batch.to(gl.int64) * shape.T + token)
                where = first_key + gl.arange(0, KEYS, layout=KEY)
                p = gl.where(where[:, None] <= row_place[None, :], p, 0.0)
            dk, dv = add_gradients(tile, rows, n, p, dk, dv, shape)
            n += 1
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        if count > 0:
            rows.release(n - 1)
        tile.release(0)
        number = gl.load(ends.more + program.at + item)
        if number < 0:
            base = (batch.to(gl.int64) * shape.C + first_key) * H + head
            inside = gl.load(ends.block_end + batch * shape.BLOCKS + block) - first_key
            store_keys(gradients.key, base, inside, dk * shape.SCALE, H, shape.K)
            store_keys(gradients.value, base, inside, dv, H, shape.V)
        else:
            base = ((batch * H + head).to(gl.int64) * shape.MORE + number) * BLOCK + program.piece * KEYS
            store_keys(gradients.key_more, base, KEYS, dk * shape.SCALE, 1, shape.K)
            store_keys(gradients.value_more, base, KEYS, dv, 1, shape.V)


@gluon.jit
def backward_key_value(
    query,
    key,
    value,
    d_output,
    lse,
    delta,
    weight,
    place,
    choosers,
    item_block,
    item_first,
    item_count,
    item_rank,
    item_more,
    item_total,
    block_begin,
    block_end,
    block_near,
    d_key,
    d_value,
    d_key_more,
    d_value_more,
    SHAPE: gl.constexpr,
):
    """d_key, d_value [B, C, H, K|V] and d_key_more, d_value_more, as ../selected_keys.py gives them.

    Grid: PIECES * PROGRAMS * H * B.
    """
    tile, rows = allocate(query, key, value, d_output, SHAPE)
    items = Items(choosers, item_block, item_first, item_count, item_total, block_begin)
    ends = Ends(item_rank, item_more, block_end, block_near)
    gradients = Gradients(d_key, d_value, d_key_more, d_value_more)
    gl.warp_specialize(
        [
            (_multiply, (place, items, ends, gradients, tile, rows, SHAPE)),
            (_copy, (query, d_output, key, value, items, tile, rows, SHAPE)),
            (_bring, (lse, delta, weight, items, rows, SHAPE)),
        ],
        [1, 1],
        [24, 24],
    )
