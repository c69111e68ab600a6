"""The inverse of a selection: for every block the tokens that chose it, cut into items of bounded size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.gpu.walks import NOWHERE, Walks
from nsa_jax.rows.blocks import Blocks
from nsa_jax.rows.segments import search

Array = jax.Array


class Items(NamedTuple):
    """Who chose what, I items a row and head; M blocks a row, see `Blocks`. Queries are in the order of their places.

    An item is a block and at most `chunk` of its choosers, all in one stretch of the queries. Items are in the order of
    their stretches, so that those that are worked on at the same time read the same queries.

    Attributes:
        choosers: int32 [B * H * Tq * S], those of one block in a run, ascending: 2 * query, plus 1 if it selected the
            block and does not merely touch it with its window.
        block: int32 [B, H, I], the block of an item.
        first: int32 [B, H, I], where its choosers begin.
        count: int32 [B, H, I], how many they are.
        rank: int32 [B, H, I], how many choosers the block has before them.
        place: int32 [B, H, I], the item's place among those that are not a block's first one, block after block; -1
            for a first one, of which every block has one.
        total: int32 [B, H], the items.
        further: int32 [B, H, M + 1], the place of the second item of block m, or where it would be.
    """

    choosers: Array
    block: Array
    first: Array
    count: Array
    rank: Array
    place: Array
    total: Array
    further: Array

    def of_kernels(self) -> tuple[Array, ...]:
        """What the kernels that go through the items take."""
        return self[:-1]


def invert(walks: Walks, blocks: Blocks, chunk: int, stretch: int, more: int) -> Items:
    """The Items of a selection.

    Args:
        walks: of single queries in the order of their places, begins and members [B, H, Tq, S].
        blocks: the blocks of the rows.
        chunk: queries an item may hold.
        stretch: queries in a stretch.
        more: see `more_items`.
    """
    B, H, T, S = walks.begins.shape
    M, R = blocks.begin.shape[1], -(-T // stretch)
    if B * H * (M * R + 1) >= 2**31:
        raise ValueError(
            f"block_indices: {B} rows x {H} heads x {M} blocks x {R} stretches of the queries do not fit 32-bit numbers"
        )

    wanted = walks.begins != NOWHERE
    number = jax.vmap(lambda numbers, keys: numbers[keys])(blocks.number, jnp.where(wanted, walks.begins, 0))
    list_of = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H, 1, 1)
    token = jax.lax.broadcasted_iota(jnp.int32, (B, H, T, S), 2)
    bucket = jnp.where(wanted, (list_of * M + number) * R + token // stretch, B * H * M * R)
    # a stable sort, unlike atomics, gives the same order every time
    buckets, choosers = jax.lax.sort(
        (bucket.reshape(-1), (2 * token + (walks.members & 1)).reshape(-1)), num_keys=1, is_stable=True
    )
    bounds = search(buckets, jnp.arange(B * H * M * R + 1, dtype=jnp.int32), "left")
    first, counts = (x.reshape(B, H, M, R) for x in (bounds[:-1], jnp.diff(bounds)))

    is_real = jnp.arange(M, dtype=jnp.int32)[None, :] < blocks.count[:, None]
    own = jnp.minimum(blocks.first, T - 1) // stretch  # no query that stands before it chooses a block
    is_own = jnp.arange(R, dtype=jnp.int32)[None, None, :] == own[..., None]
    least = (is_own & is_real[..., None]).astype(jnp.int32)[:, None]  # [B, 1, M, R]
    items = jnp.maximum(-(-counts // chunk), least)
    of_block = jnp.cumsum(items, axis=3, dtype=jnp.int32)
    further = jnp.cumsum(jnp.maximum(of_block[..., -1] - 1, 0), axis=2, dtype=jnp.int32)
    further = jnp.pad(further, ((0, 0), (0, 0), (1, 0)))

    def by_stretch(x):
        return x.swapaxes(2, 3).reshape(B, H, R * M)

    ends = jnp.cumsum(by_stretch(items), axis=2, dtype=jnp.int32)
    item = jnp.arange(M + more, dtype=jnp.int32)
    find = jax.vmap(jax.vmap(lambda ends: search(ends, item, "right")))
    pair = jnp.minimum(find(ends), R * M - 1)

    def of_item(x):
        return jnp.take_along_axis(by_stretch(x), pair, axis=2)

    chunk_number = item[None, None, :] - jnp.take_along_axis(ends, pair, axis=2) + of_item(items)
    before = of_item(of_block - items) + chunk_number  # items of the same block
    return Items(
        choosers=choosers,
        block=pair % M,
        first=of_item(first) + chunk_number * chunk,
        count=jnp.minimum(of_item(counts) - chunk_number * chunk, chunk),
        rank=of_item(first - first[..., :1]) + chunk_number * chunk,
        place=jnp.where(before == 0, -1, jnp.take_along_axis(further, pair % M, axis=2) + before - 1),
        total=ends[..., -1],
        further=further,
    )


def more_items(queries: int, keys: int, picks: int, block_size: int, chunk: int, stretch: int, sliced: bool) -> int:
    """The most items of a row and head beyond one per block.

    Args:
        queries, keys: Tq and T.
        picks: the most blocks that a query wants.
        block_size, chunk, stretch: as in `invert`.
        sliced: whether the queries stand at places of their own, and not at one token each.
    """
    # a stretch has choosers of blocks that are not its own only in the segment that reaches into it
    begins = range(stretch, queries, stretch)
    reaching = sum(-(-(keys if sliced else begin) // block_size) for begin in begins)
    return min(reaching, queries * picks) + queries * picks // chunk
