"""The inverse of a selection: for every block the tokens that chose it, cut into items of bounded size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.segments import Blocks
from nsa_jax.walk import NOWHERE, Walks

Array = jax.Array


class Items(NamedTuple):
    """Who chose what; M blocks a row, see `segments.Blocks`.

    Attributes:
        choosers: int32 [B * H * T * S], those of one block in a run, tokens ascending: 2 * token, plus 1 if it selected
            the block and does not merely touch it with its window.
        chooser_first: int32 [B, H, M + 1], where the run of block m begins, and that of block m - 1 ends.
        item_first: int32 [B, H, M + 1], the first item of block m. A block has an item for every `chunk` tokens begun,
            and at least one.
        item_block: int32 [B, H, I], the block of an item.
    """

    choosers: Array
    chooser_first: Array
    item_first: Array
    item_block: Array


def invert(walks: Walks, blocks: Blocks, chunk: int) -> Items:
    """The Items of a selection.

    Args:
        walks: of single tokens, begins and members [B, H, T, S].
        blocks: the blocks of the rows.
        chunk: tokens an item may hold.
    """
    B, H, T, S = walks.begins.shape
    M = blocks.begin.shape[1]
    if B * H * (M + 1) >= 2**31:
        raise ValueError(f"block_indices: {B} rows x {H} heads x {M} blocks do not fit 32-bit block numbers")

    wanted = walks.begins != NOWHERE
    number = jax.vmap(lambda numbers, keys: numbers[keys])(blocks.number, jnp.where(wanted, walks.begins, 0))
    list_of = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H, 1, 1)
    bucket = jnp.where(wanted, list_of * M + number, B * H * M)
    chooser = 2 * jax.lax.broadcasted_iota(jnp.int32, (B, H, T, S), 2) + (walks.members & 1)
    # a stable sort, unlike atomics, gives the same order every time
    buckets, choosers = jax.lax.sort((bucket.reshape(-1), chooser.reshape(-1)), num_keys=1, is_stable=True)
    bounds = jnp.searchsorted(buckets, jnp.arange(B * H * M + 1, dtype=jnp.int32)).astype(jnp.int32)
    chooser_first = jnp.concatenate([bounds[:-1].reshape(B, H, M), bounds[M::M].reshape(B, H, 1)], axis=2)

    real = jnp.arange(M, dtype=jnp.int32)[None, None, :] < blocks.count[:, None, None]
    items = jnp.where(real, jnp.maximum(-(-jnp.diff(chooser_first, axis=2) // chunk), 1), 0)
    item_first = jnp.pad(jnp.cumsum(items, axis=2, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    item = jnp.arange(M + more_items(T, S, chunk), dtype=jnp.int32)
    find = jax.vmap(jax.vmap(lambda firsts: jnp.searchsorted(firsts, item, side="right").astype(jnp.int32)))
    return Items(choosers, chooser_first, item_first, find(item_first[:, :, 1:]))


def more_items(length: int, picks: int, chunk: int) -> int:
    """The most items of a row and head beyond one per block."""
    return length * picks // chunk
