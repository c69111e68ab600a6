"""Attention to chosen blocks of keys on Hopper (sm_90): the pass of selected.py from the block's side, in Gluon.

See hopper_keys.py. A program has 64 keys of a block and the tokens of an item (inverse.py), which are gathered.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_init, warpgroup_mma_wait

from .hopper import WIDTH, arrive, as_rows, product_layout
from .hopper_keys import (
    KEY,
    KEYS,
    LANES,
    ROW,
    ROWS,
    add_gradients,
    allocate,
    bring_statistics,
    probabilities,
    store_keys,
)


@gluon.jit
def _program(H: gl.constexpr, SHARES: gl.constexpr, PROGRAMS: gl.constexpr):
    """The share of the block, the first item, the head and the row of this program."""
    program = gl.program_id(0)
    worker = program // SHARES
    return program % SHARES, worker % PROGRAMS, worker // PROGRAMS % H, worker // PROGRAMS // H


@gluon.jit
def _choosers(items, item, item_first, item_count, G: gl.constexpr):
    """Where an item's choosers begin, and how many (chooser, head of the group) pairs they make."""
    return gl.load(item_first + items + item), gl.load(item_count + items + item) * G


@gluon.jit
def _item(
    items, item, item_block, item_first, item_count, block_begin, row, share, G: gl.constexpr, BLOCKS: gl.constexpr
):
    """An item's block, its `_choosers`, and the first key of a share of the block."""
    block = gl.load(item_block + items + item)
    first, slots = _choosers(items, item, item_first, item_count, G)
    return block, first, slots, gl.load(block_begin + row * BLOCKS + block) + share * KEYS


@gluon.jit
def _copy(
    query, d_output, key, value, choosers, item_block, item_first, item_count, item_total, block_begin,
    keys, values, queries, cotangents, keys_full, keys_empty, full, empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr, SHARES: gl.constexpr,
    BLOCKS: gl.constexpr, ITEMS: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    PIECE: gl.constexpr = min(G, ROWS)  # rows of one token
    PIECES: gl.constexpr = ROWS // PIECE
    share, worker, head, row = _program(H, SHARES, PROGRAMS)
    items = (row * H + head).to(gl.int64) * ITEMS
    done = 0
    n = 0
    for item in range(worker, gl.load(item_total + row * H + head), PROGRAMS):
        _, first, slots, first_key = _item(
            items, item, item_block, item_first, item_count, block_begin, row, share, G, BLOCKS
        )
        mbarrier.wait(keys_empty, (done & 1) ^ 1)
        mbarrier.expect(keys_full, 2 * KEYS * (K + V))
        tma.async_load(key, [row, first_key, head * K], keys_full, keys)
        tma.async_load(value, [row, first_key, head * V], keys_full, values)
        done += 1
        for i in range((slots + ROWS - 1) // ROWS):
            slot = n % STAGES
            q = queries.index(slot).reinterpret(query.dtype, [K // WIDTH * PIECES, 1, 1, PIECE, WIDTH], query.layout)
            do = cotangents.index(slot).reinterpret(
                query.dtype, [V // WIDTH * PIECES, 1, 1, PIECE, WIDTH], query.layout
            )
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * ROWS * (K + V))
            for j in gl.static_range(PIECES):
                at = i * ROWS + j * PIECE
                # rows that are not real are read from behind the row, as zeros
                token = T
                if at < slots:
                    token = gl.load(choosers + first + at // G) >> 1
                for part in gl.static_range(K // WIDTH):
                    place = [row, token, head * G + at % G, part * WIDTH]
                    tma.async_load(query, place, full.index(slot), q.index(part * PIECES + j))
                for part in gl.static_range(V // WIDTH):
                    place = [row, token, head * G + at % G, part * WIDTH]
                    tma.async_load(d_output, place, full.index(slot), do.index(part * PIECES + j))
            n += 1


@gluon.jit
def _bring(
    lse, delta, weight, choosers, item_first, item_count, item_total, statistics, full, empty,
    T: gl.constexpr, H: gl.constexpr, G: gl.constexpr, SHARES: gl.constexpr, ITEMS: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings the rows' statistics."""
    _, worker, head, row = _program(H, SHARES, PROGRAMS)
    items = (row * H + head).to(gl.int64) * ITEMS
    base = (row.to(gl.int64) * T * H + head) * G
    n = 0
    for item in range(worker, gl.load(item_total + row * H + head), PROGRAMS):
        first, slots = _choosers(items, item, item_first, item_count, G)
        for i in range((slots + ROWS - 1) // ROWS):
            place = i * ROWS + gl.arange(0, ROWS, layout=LANES)
            token = gl.load(choosers + first + place // G, mask=place < slots, other=0) >> 1
            if T * H * G >= 2**31:
                token = token.to(gl.int64)
            offset = base + token * (H * G) + place % G
            bring_statistics(lse, delta, weight, offset, place < slots, statistics, full, empty, n, STAGES)
            n += 1


@gluon.jit
def _multiply(
    place, choosers, item_block, item_first, item_count, item_rank, item_place, item_total, block_begin, block_end,
    d_key, d_value, d_key_more, d_value_more, keys, values, queries, cotangents, statistics, keys_full, keys_empty,
    full, empty,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    SCALE: gl.constexpr, BLOCK: gl.constexpr, BLOCKS: gl.constexpr, ITEMS: gl.constexpr, MORE: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warpgroup."""
    of_k: gl.constexpr = product_layout(K)
    of_v: gl.constexpr = product_layout(V)
    share, worker, head, row = _program(H, BLOCK // KEYS, PROGRAMS)
    items = (row * H + head).to(gl.int64) * ITEMS
    k, v = as_rows(keys, KEYS, K), as_rows(values, KEYS, V)
    done = 0
    n = 0
    for item in range(worker, gl.load(item_total + row * H + head), PROGRAMS):
        block, first, slots, first_key = _item(
            items, item, item_block, item_first, item_count, block_begin, row, share, G, BLOCKS
        )
        # a block's choosers are distinct tokens, ascending from its first: only so many stand in it
        near = (BLOCK - gl.load(item_rank + items + item)) * G
        dk = warpgroup_mma_init(gl.full([KEYS, K], 0.0, gl.float32, of_k))
        dv = warpgroup_mma_init(gl.full([KEYS, V], 0.0, gl.float32, of_v))
        mbarrier.wait(keys_full, done & 1)
        done += 1
        for i in range((slots + ROWS - 1) // ROWS):
            p, dk, dv = probabilities(k, dk, dv, queries, statistics, full, empty, n, i == 0, K, SCALE, STAGES)
            if i * ROWS < near:
                slot = i * ROWS + gl.arange(0, ROWS, layout=ROW)
                token = gl.load(choosers + first + slot // G, mask=slot < slots, other=0) >> 1
                row_place = gl.load(place + row.to(gl.int64) * T + token)
                where = first_key + gl.arange(0, KEYS, layout=KEY)
                p = gl.where(where[:, None] <= row_place[None, :], p, 0.0)
            dk, dv = add_gradients(p, v, dk, dv, queries, cotangents, statistics, n, K, V, STAGES)
            n += 1
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        if slots > 0:
            arrive(empty.index((n - 1) % STAGES))
        arrive(keys_empty)
        further = gl.load(item_place + items + item)
        if further < 0:
            base = (row.to(gl.int64) * C + first_key) * H + head
            count = gl.load(block_end + row * BLOCKS + block) - first_key
            store_keys(d_key, base, count, dk * SCALE, H, K)
            store_keys(d_value, base, count, dv, H, V)
        else:
            base = ((row * H + head).to(gl.int64) * MORE + further) * BLOCK + share * KEYS
            store_keys(d_key_more, base, KEYS, dk * SCALE, 1, K)
            store_keys(d_value_more, base, KEYS, dv, 1, V)


@gluon.jit
def backward_key_value(
    query, key, value, d_output, lse, delta, weight, place, choosers, item_block, item_first, item_count, item_rank,
    item_place, item_total, block_begin, block_end, d_key, d_value, d_key_more, d_value_more,
    T: gl.constexpr, C: gl.constexpr, H: gl.constexpr, G: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    SCALE: gl.constexpr, BLOCK: gl.constexpr, BLOCKS: gl.constexpr, ITEMS: gl.constexpr, MORE: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """d_key, d_value [B, C, H, K|V] and d_key_more, d_value_more, as selected.py's `backward_key_value` gives them.

    Grid: (BLOCK // KEYS) * PROGRAMS * H * B.
    """
    keys, values, queries, cotangents, statistics, keys_full, keys_empty, full, empty = allocate(
        query, key, value, d_output, K, V, STAGES
    )
    gl.warp_specialize(
        [
            (_multiply, (
                place, choosers, item_block, item_first, item_count, item_rank, item_place, item_total, block_begin,
                block_end, d_key, d_value, d_key_more, d_value_more, keys, values, queries, cotangents, statistics,
                keys_full, keys_empty, full, empty,
                T, C, H, G, K, V, SCALE, BLOCK, BLOCKS, ITEMS, MORE, PROGRAMS, STAGES,
            )),
            (_copy, (
                query, d_output, key, value, choosers, item_block, item_first, item_count, item_total, block_begin,
                keys, values, queries, cotangents, keys_full, keys_empty, full, empty,
                T, H, G, K, V, BLOCK // KEYS, BLOCKS, ITEMS, PROGRAMS, STAGES,
            )),
            (_bring, (
                lse, delta, weight, choosers, item_first, item_count, item_total, statistics, full, empty,
                T, H, G, BLOCK // KEYS, ITEMS, PROGRAMS, STAGES,
            )),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
