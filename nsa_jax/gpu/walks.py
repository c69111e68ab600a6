"""From chosen blocks to what the kernels of the selected branch walk."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.rows import sight
from nsa_jax.rows.queries import Row
from nsa_jax.runtime import launch, transforms

Array = jax.Array

NOWHERE = 2**31 - 1  # stands for "no block" among first keys
MOST_SORTED = 2048  # entries that the kernels sort: beyond, their code is too long to compile
_ENTRIES = 512  # a program takes so many tiles that it has as many entries


class Choice(NamedTuple):
    """Which blocks of keys the queries want.

    Attributes:
        row: where the queries stand.
        selected: int32 [B, Tq, H, S], the row index of the first key of each selected block, NOWHERE where none; any
            order, repeats allowed.
        touched: int32 [B, Tq, X], likewise the blocks that the query's sliding window touches; None without one.
    """

    row: Row
    selected: Array
    touched: Array | None

    @property
    def wanted(self) -> int:
        """The most blocks a query wants."""
        return self.selected.shape[3] + (0 if self.touched is None else self.touched.shape[2])

    def in_order(self) -> "Choice":
        """The Choice of the queries in the order of their places."""
        queries = self.row.queries
        order, standing = queries.order, queries.standing
        by_place = jax.tree.map(queries.in_order, queries._replace(order=None, standing=None))
        row = dataclasses.replace(self.row, queries=by_place._replace(order=order, standing=standing))
        return Choice(row, *jax.tree.map(queries.in_order, (self.selected, self.touched)))


class Walks(NamedTuple):
    """The blocks that tiles of tokens walk, see kernels/block_lists.py.

    Attributes:
        begins: int32 [B, H, tiles, tokens * (S + X)], first keys, ascending, without repeats, NOWHERE after the last.
        members: int32, likewise, which tokens of the tile want the block.
        counts: int32 [B, H, tiles], the blocks of a walk.
        plain_counts: int32 [B, H, tiles], how many of them, the first ones, lie before every token and its window.
    """

    begins: Array
    members: Array
    counts: Array
    plain_counts: Array


class PairedWalks(NamedTuple):
    """What pairs of tiles of tokens walk at the same time, step by step, see kernels/block_lists.py.

    What is behind the steps is not written.

    Attributes:
        begins: int32 [B, H, pairs, 2, tokens * S], first keys; shared blocks at the same step of both.
        members: int32, likewise, which tokens of the tile want the block, 2 ** 30 if the other tile does too; 0 for
            none.
        counts: int32 [B, H, pairs], the steps of both.
        edges: int32 [B, H, pairs]: blocks that begin up to there lie before every token.
    """

    begins: Array
    members: Array
    counts: Array
    edges: Array


def choose(row: Row, block_indices: Array, block_counts: Array | None, block_size: int, window_size: int = 0) -> Choice:
    """The Choice that selected blocks and a sliding window make.

    Args:
        row: where the queries stand.
        block_indices: int32 [B, Tq, H, S], relative to the segment, see `selected_attention`.
        block_counts: int32 () or [B, Tq, H], how many of the first entries count; None for all.
        block_size: tokens in a block.
        window_size: tokens in the sliding window; 0 for none.
    """
    queries = row.queries
    own = queries.position // block_size
    keep = (block_indices >= 0) & (block_indices <= own[:, :, None, None]) & queries.valid[:, :, None, None]
    if block_counts is not None:
        counts = jnp.broadcast_to(block_counts, block_indices.shape[:3])
        keep &= jax.lax.broadcasted_iota(jnp.int32, block_indices.shape, 3) < counts[..., None]
    selected = queries.start[:, :, None, None] + jnp.where(keep, block_indices, 0) * block_size

    selected = jnp.where(keep, selected, NOWHERE)
    if not window_size:
        return Choice(row, selected, None)

    back = jnp.arange(_blocks_touched(window_size, block_size), dtype=jnp.int32)
    near = own[..., None] - back[None, None, :]
    earliest = jnp.maximum(queries.position - (window_size - 1), 0) // block_size
    reached = (near >= earliest[..., None]) & queries.valid[..., None]
    touched = queries.start[..., None] + near * block_size
    return Choice(row, selected, jnp.where(reached, touched, NOWHERE))


def seen_of(choice: Choice, unclean: Array, block_size: int) -> Array:
    """int8 [B, Tq, H]: what queries see of their selected blocks; unclean: see `cleaning.Cleaned`."""
    listed = choice.selected != NOWHERE
    first = jnp.where(listed, choice.selected, 0)
    end = jnp.minimum(first + block_size, choice.row.queries.place[:, :, None, None] + 1)
    return sight.of_ranges(unclean, first, jnp.where(listed, end, 0))


def _blocks_touched(window_size: int, block_size: int) -> int:
    """The most blocks that a window touches."""
    return 1 + (window_size + block_size - 2) // block_size


def walks(choice: Choice, tokens: int, block_size: int, window_size: int = 0) -> Walks:
    """The Walks of tiles of `tokens` tokens, at most 16; the other arguments as in `choose`."""
    from nsa_jax.kernels import block_lists as kernels

    B, T, H, chosen = choice.selected.shape
    first_keys = choice.selected
    if choice.touched is not None:
        touched = jnp.broadcast_to(choice.touched[:, :, None, :], (B, T, H, choice.touched.shape[2]))
        first_keys = jnp.concatenate([choice.selected, touched], axis=3)
    constants = {"CHOSEN": chosen, "BLOCK": block_size, "WINDOW": window_size}
    arrays = first_keys, choice.row.queries.place
    return Walks(*_launch(kernels.walk, arrays, choice, tokens, (), constants))


def walks_in_pairs(choice: Choice, tokens: int, block_size: int) -> PairedWalks:
    """The PairedWalks of tiles of `tokens` tokens, at most 16, of a choice without a window."""
    from nsa_jax.kernels import block_lists as kernels

    constants = {"CHOSEN": choice.selected.shape[3], "BLOCK": block_size, "WINDOW": 0}
    arrays = choice.selected, choice.row.queries.place, choice.row.queries.start
    return PairedWalks(*_launch(kernels.walk_in_pairs, arrays, choice, 2 * tokens, (2,), constants))


def _launch(kernel, arrays, choice, tokens, parts, constants) -> list[Array]:
    """Runs a kernel of kernels/block_lists.py.

    Args:
        kernel: of that file.
        arrays: first keys and what the kernel takes after them.
        choice, tokens: as in `walks`.
        parts: axes into which the entries of `tokens` tokens are cut.
        constants: of its shape.
    """
    from nsa_jax.kernels.block_lists import WalkShape

    length = choice.row.length

    def run(first_keys, *arrays):
        B, T, H, S = first_keys.shape
        sides = tiling.power_of_two(tokens), tiling.power_of_two(S)
        entries = sides[0] * sides[1]
        wide = length * 2 * sides[0] >= 2**31
        is_sorted = entries > MOST_SORTED and not wide
        if is_sorted:
            first_keys = _sorted_keys(first_keys, tokens, constants["CHOSEN"], 2 * sides[0])
        per_program = max(1, _ENTRIES // entries)
        sizes = {"T": T, "H": H, "S": S, "TOKENS": tokens, "PER_PROGRAM": per_program}
        shape = WalkShape(**sizes, WIDE=wide, SORTED=is_sorted, **constants)
        tiles = B, H, shape.TILES
        lists = *tiles, *parts, shape.ENTRIES // math.prod(parts)
        return launch.launch(
            kernel,
            first_keys,
            *arrays,
            name="selected_walk",
            outputs=[jax.ShapeDtypeStruct(s, jnp.int32) for s in (lists, lists, tiles, tiles)],
            programs=-(-shape.TILES // per_program) * H * B,
            # a thread gets up to 8 entries, unless threads run out
            warps=max(4, min(16, entries // 256)),
            stages=1,
            flops=0,
            SHAPE=shape,
        )

    return transforms.fold_vmap(run)(*arrays)


def _sorted_keys(first_keys: Array, tokens: int, chosen: int, low: int) -> Array:
    """What the kernels would sort, int32 [B, H, tiles, tokens * S]: first keys times `low`, in the lower bits twice the
    token, plus 1 for blocks that are not selected."""
    B, T, H, S = first_keys.shape
    tiles = -(-T // tokens)
    first_keys = jnp.pad(first_keys, ((0, 0), (0, tiles * tokens - T), (0, 0), (0, 0)), constant_values=NOWHERE)
    first_keys = jnp.moveaxis(first_keys.reshape(B, tiles, tokens, H, S), 3, 1)  # [B, H, tiles, tokens, S]
    token, pick = (jax.lax.broadcasted_iota(jnp.int32, first_keys.shape, axis) for axis in (3, 4))
    keys = first_keys * low + 2 * token + (pick >= chosen).astype(jnp.int32)
    keys = jnp.where(first_keys < NOWHERE, keys, NOWHERE)
    return jax.lax.sort(keys.reshape(B, H, tiles, tokens * S), dimension=3)
