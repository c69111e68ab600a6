"""Segment ids to where each token stands.

A segment is a maximal run of equal ids within a row; negative ids are padding. Everything here is traced and has a
static shape, so one compiled program serves every packing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import checks
from nsa_jax.runtime.eager import one_program

Array = jax.Array


class Layout(NamedTuple):
    """Where each token stands; all [B, T]. A run of padding has a start, stop and position like any segment.

    Attributes:
        start: int32, the row index of the first token of the token's segment.
        stop: int32, one past the row index of its last.
        position: int32, the token's place in its segment.
        valid: bool, False on padding.
    """

    start: Array
    stop: Array
    position: Array
    valid: Array

    @property
    def index(self) -> Array:
        """int32 [B, T], where in the row each token stands."""
        return self.start + self.position


def layout(segment_ids: Array | None, batch: int, length: int) -> Layout:
    """The Layout of segment ids int32 [batch, length]; `None` is one segment per row."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return Layout(jnp.zeros_like(index), jnp.full_like(index, length), index, jnp.ones(index.shape, bool))
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, 1), bool)
    is_first = jnp.concatenate([edge, changes], axis=1)
    is_last = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(is_last, index + 1, length), axis=1, reverse=True)
    return Layout(start, stop, index - start, segment_ids >= 0)


def clear_padding(x: Array, valid: Array) -> Array:
    """x [B, Tq, ...] with zeros where `valid` bool [B, Tq] is False: nothing stored there, NaN included, counts."""
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def search(ascending: Array, values: Array, side: str) -> Array:
    """int32: where values would be put; unrolled, since each turn of a loop would be two launches on a GPU."""
    return jnp.searchsorted(ascending, values, side=side, method="scan_unrolled").astype(jnp.int32)


def segment_ids_from_cu_seqlens(cu_seqlens: Array, length: int) -> Array:
    """Cumulative sequence lengths, as varlen attention in PyTorch takes them, to segment ids.

    Args:
        cu_seqlens: integers [n + 1], or [B, n + 1] for several rows; sequence i covers the tokens
            [cu_seqlens[i], cu_seqlens[i + 1]). May be traced; empty sequences are allowed.
        length: T, the tokens of a row.

    Returns:
        int32 [1, T] (or [B, T]): the sequence's number, and -1 (padding) outside [cu_seqlens[0], cu_seqlens[n]).

    Raises:
        TypeError: cu_seqlens is not of an integer dtype, or length is not an int.
        ValueError: cu_seqlens is not [n + 1] or [B, n + 1], or length is not positive.
    """
    ends = checks.cu_seqlens(cu_seqlens)
    length = checks.integer("length", length, 1, checks.MOST_INT)
    return _numbers(ends, length)


@one_program
def _numbers(ends: Array, length: int) -> Array:
    ends = ends.reshape(ends.size // ends.shape[-1], ends.shape[-1])
    index = jnp.arange(length, dtype=jnp.int32)
    number = jax.vmap(lambda row: search(row, index, "right"))(ends) - 1
    return jnp.where(index[None, :] < ends[:, -1:], number, -1)
