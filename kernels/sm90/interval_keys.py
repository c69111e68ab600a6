"""Attention to one interval of keys on Hopper (sm_90): the pass of ../interval.py from the keys' side, in Gluon.

See key_pass.py. A program has a tile of keys and one of SPLITS parts of the batch row's query rows.
"""

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from ..shape import Shape
from .key_pass import (
    KEY,
    KEYS,
    LANES,
    ROW,
    ROWS,
    WARPS,
    add_gradients,
    allocate,
    no_gradients,
    probabilities,
    store_keys,
)
from .rows import copy_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalKeyShape(Shape):
    """What the pass here has.

    Attributes:
        B: batch rows.
        SPLITS: parts into which the query rows of a batch row are cut.
        STAGES: slots of the ring.
    """

    B: int
    SPLITS: int
    STAGES: int

    @property
    def TILES(self) -> int:
        return -(-self.C // KEYS.value)


@gluon.aggregate
class Program:
    """What a program works on.

    Attributes:
        tile: of keys.
        split: of the query rows, of which there are SPLITS.
        head, row: kv head and batch row.
        query_begin, query_end: pointers, int32 [B, C]; the queries that see each key.
    """

    tile: gl.tensor
    split: gl.tensor
    head: gl.tensor
    row: gl.tensor
    query_begin: gl.tensor
    query_end: gl.tensor

    @gluon.jit
    def intervals(self, shape, layout: gl.constexpr):
        """The queries [begin, end) that see each key [KEYS], and which keys are real."""
        number = self.tile * KEYS + gl.arange(0, KEYS, layout=layout)
        base = self.row.to(gl.int64) * shape.C
        inside = number < shape.C
        begin = gl.load(self.query_begin + base + number, mask=inside, other=0)
        return begin, gl.load(self.query_end + base + number, mask=inside, other=0), inside

    @gluon.jit
    def slots(self, begin, end, shape):
        """The slots of query rows [first, last) in the split that any key is seen by."""
        SLOTS: gl.constexpr = (shape.T * shape.G + ROWS * shape.SPLITS - 1) // (ROWS * shape.SPLITS)
        first = gl.min(gl.where(end > begin, begin, shape.T), 0) * shape.G // ROWS
        last = (gl.max(gl.where(end > begin, end, 0), 0) * shape.G + ROWS - 1) // ROWS
        return gl.maximum(first, self.split * SLOTS), gl.minimum(last, self.split * SLOTS + SLOTS)


@gluon.jit
def _program(query_begin, query_end, shape):
    """The `Program` of this program."""
    TILES: gl.constexpr = shape.TILES
    SPLITS: gl.constexpr = shape.SPLITS
    program = gl.program_id(0)
    # programs that run together have the same split; late queries, which see most tiles, go first
    split = SPLITS - 1 - program // TILES % SPLITS
    head = program // (TILES * SPLITS) % shape.H
    row = program // (TILES * SPLITS * shape.H)
    return Program(program % TILES, split, head, row, query_begin, query_end)


@gluon.jit
def _nth(n, first, last):
    """The n-th slot that a program takes. Of slots that lie in their reach, all programs take the same one n-th: those
    that run together then read it from memory once."""
    count = last - first
    return first + (n + count - first % count) % count


@gluon.jit
def _copy(query, key, value, d_output, query_begin, query_end, tile, rows, shape):
    """The copying warp."""
    program = _program(query_begin, query_end, shape)
    tile.copy(0, key, value, program.row, program.tile * KEYS, program.head, shape)
    begin, end, _ = program.intervals(shape, LANES)
    first, last = program.slots(begin, end, shape)
    for n in range(last - first):
        at = _nth(n, first, last) * ROWS
        q, do, barrier = rows.begin_copy(n, shape)
        copy_rows(query, q, barrier, program.row, at, program.head, shape.G, shape.K, ROWS)
        copy_rows(d_output, do, barrier, program.row, at, program.head, shape.G, shape.V, ROWS)


@gluon.jit
def _bring(lse, delta, weight, query_begin, query_end, rows, shape):
    """The warp that brings the rows' statistics."""
    program = _program(query_begin, query_end, shape)
    G: gl.constexpr = shape.G
    begin, end, _ = program.intervals(shape, LANES)
    first, last = program.slots(begin, end, shape)
    for n in range(last - first):
        at = _nth(n, first, last) * ROWS
        query_row = at + gl.arange(0, ROWS, layout=LANES)
        base = ((program.row.to(gl.int64) * shape.T + at // G) * shape.H + program.head) * G
        offset = base + (query_row // G - at // G) * (shape.H * G) + query_row % G
        rows.bring_statistics(n, lse, delta, weight, offset, query_row < shape.T * G, shape)


@gluon.jit
def _multiply(query_begin, query_end, d_key, d_value, tile, rows, shape):
    """The multiplying warpgroup."""
    program = _program(query_begin, query_end, shape)
    C: gl.constexpr = shape.C
    G: gl.constexpr = shape.G
    begin, end, inside = program.intervals(shape, gl.BlockedLayout([2], [32], [WARPS], [0]))
    first, last = program.slots(begin, end, shape)
    # the slots [lower, upper) are seen by all keys
    lower = (gl.max(gl.where(inside, begin, 0), 0) * G + ROWS - 1) // ROWS
    upper = gl.min(gl.where(inside, end, shape.T), 0) * G // ROWS
    begin, end, _ = program.intervals(shape, KEY)
    dk, dv = no_gradients(shape)
    tile.wait_full(0)
    for n in range(last - first):
        i = _nth(n, first, last)
        p, dk, dv = probabilities(tile, rows, n, n == 0, dk, dv, shape)
        if (i < lower) | (i >= upper):
            token = (i * ROWS + gl.arange(0, ROWS, layout=ROW)) // G
            p = gl.where((token[None, :] >= begin[:, None]) & (token[None, :] < end[:, None]), p, 0.0)
        dk, dv = add_gradients(tile, rows, n, p, dk, dv, shape)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    base = ((program.split.to(gl.int64) * shape.B + program.row) * C + program.tile * KEYS) * shape.H + program.head
    store_keys(d_key, base, C - program.tile * KEYS, dk * shape.SCALE, shape.H, shape.K)
    store_keys(d_value, base, C - program.tile * KEYS, dv, shape.H, shape.V)


@gluon.jit
def backward_key_value(
    query,
    key,
    value,
    d_output,
    lse,
    delta,
    weight,
    query_begin,
    query_end,
    d_key,
    d_value,
    SHAPE: gl.constexpr,
):
    """d_key, d_value [SPLITS, B, C, H, K|V], as ../interval.py's `backward_key_value` gives them.

    SHAPE is an `IntervalKeyShape`. Grid: TILES * SPLITS * H * B.
    """
    tile, rows = allocate(query, key, value, d_output, SHAPE)
    gl.warp_specialize(
        [
            (_multiply, (query_begin, query_end, d_key, d_value, tile, rows, SHAPE)),
            (_copy, (query, key, value, d_output, query_begin, query_end, tile, rows, SHAPE)),
            (_bring, (lse, delta, weight, query_begin, query_end, rows, SHAPE)),
        ],
        [1, 1],
        [24, 24],
    )
