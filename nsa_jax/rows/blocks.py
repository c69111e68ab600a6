"""The selection blocks of key rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.queries import Row
from nsa_jax.rows.windows import scatter

Array = jax.Array


class Blocks(NamedTuple):
    """The blocks of every row, numbered densely along the row; runs of padding are cut into blocks too.

    Attributes:
        number: int32 [B, T], the number of the block that holds the token.
        begin, end: int32 [B, M], the row indices [begin, end) of block m; 0, 0 beyond the last. M is
            cdiv(T, block_size) without segment ids and T with them, the most there can be.
        count: int32 [B], the blocks in the row.
        first: int32 [B, M], of the queries in the order of their places the first that stands at or after the block.
        near: int32 [B, M], how many queries from the first on stand in the block or within the window behind it.
    """

    number: Array
    begin: Array
    end: Array
    count: Array
    first: Array
    near: Array


def blocks(row: Row, block_size: int, window_size: int = 0) -> Blocks:
    """The Blocks of a row, for a sliding window of `window_size` tokens that is done with them."""
    tokens, most = row.tokens, most_blocks(row.packed, row.length, block_size)
    is_first = tokens.position % block_size == 0
    number = jnp.cumsum(is_first, axis=1, dtype=jnp.int32) - 1
    begin = scatter(number, tokens.index, is_first, most, 0)
    end = scatter(number, jnp.minimum(tokens.index + block_size, tokens.stop), is_first, most, 0)
    first, past = row.queries.between(begin, begin + (block_size + window_size))
    return Blocks(number, begin, end, number[:, row.length - 1] + 1, first, past - first)


def most_blocks(packed: bool, length: int, block_size: int) -> int:
    """The most blocks a row can hold: every token of a packed one may be a segment of its own."""
    return length if packed else -(-length // block_size)
