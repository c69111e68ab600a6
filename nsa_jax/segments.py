"""Segment ids to what the kernels use: where segments, windows and blocks begin and end in a row.

A segment is a maximal run of equal ids within a row; negative ids are padding. Everything here is traced and has a
static shape, so one compiled program serves every packing. Letters as in the package docstring; C = T // stride window
slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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


class Intervals(NamedTuple):
    """Who sees whom, from both sides: query t the keys from key_begin to key_end, key c the queries
    from query_begin to query_end.

    Attributes:
        key_begin, key_end: int32 [B, T]. Equal where the query sees nothing.
        query_begin, query_end: int32 [B, C], with C the number of keys. Equal where nobody sees the key.
    """

    key_begin: Array
    key_end: Array
    query_begin: Array
    query_end: Array


class Blocks(NamedTuple):
    """The selection blocks of every row, numbered densely along the row; runs of padding are cut into blocks too.

    Attributes:
        number: int32 [B, T], the number of the block that holds the token.
        begin, end: int32 [B, M], the row indices [begin, end) of block m; 0, 0 beyond the last. M is
            cdiv(T, block_size) without segment ids and T with them, the most there can be.
        count: int32 [B], the blocks in the row.
    """

    number: Array
    begin: Array
    end: Array
    count: Array


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


def sliding_intervals(tokens: Layout, window_size: int) -> Intervals:
    """The sliding branch: positions p - window_size + 1 .. p of the query's own segment."""
    index = tokens.start + tokens.position
    # window_size may exceed any int32 row; a row never needs more than its own length
    reach = min(window_size, index.shape[1])
    return Intervals(
        key_begin=jnp.where(tokens.valid, jnp.maximum(tokens.start, index - reach + 1), 0),
        key_end=jnp.where(tokens.valid, index + 1, 0),
        query_begin=jnp.where(tokens.valid, index, 0),
        query_end=jnp.where(tokens.valid, jnp.minimum(tokens.stop, index + reach), 0),
    )


def _windows_seen(tokens: Layout, window: int, stride: int) -> tuple[Array, Array]:
    """(bool [B, T], whether a window ends at this token; int32 [B, T], windows of its segment complete by then)."""
    past = tokens.position - (window - 1)
    completes = tokens.valid & (past >= 0) & (past % stride == 0)
    return completes, jnp.where(tokens.valid & (past >= 0), past // stride + 1, 0)


def _scatter(slots: Array, values: Array, keep: Array, size: int, fill: int) -> Array:
    """[B, size] with values[b, i] at slots[b, i] where `keep`, `fill` elsewhere; kept slots of a row are distinct."""
    slots = jnp.where(keep, slots, size)
    empty = jnp.full((size,), fill, jnp.int32)
    return jax.vmap(lambda slot, value: empty.at[slot].set(value, mode="drop"))(slots, values)


def window_starts(tokens: Layout, window: int, stride: int) -> Array:
    """int32 [B, T // stride]: the row index of the first token of each window, -1 for a slot with no window.

    Windows fill the slots in row order: those of the first segment, then those of the second, and so on.
    """
    length = tokens.start.shape[1]
    completes, _ = _windows_seen(tokens, window, stride)
    slot = jnp.cumsum(completes, axis=1, dtype=jnp.int32) - 1
    first = tokens.start + tokens.position - (window - 1)
    return _scatter(slot, first, completes, length // stride, -1)


def window_intervals(tokens: Layout, window: int, stride: int) -> Intervals:
    """The compressed branch: the windows c of the query's segment with c * stride + window - 1 <= p."""
    slots = tokens.start.shape[1] // stride
    completes, seen = _windows_seen(tokens, window, stride)
    total = jnp.cumsum(completes, axis=1, dtype=jnp.int32)
    end = jnp.where(seen > 0, total, 0)
    index = tokens.start + tokens.position
    return Intervals(
        key_begin=end - seen,
        key_end=end,
        query_begin=_scatter(total - 1, index, completes, slots, 0),
        query_end=_scatter(total - 1, tokens.stop, completes, slots, 0),
    )


def blocks(tokens: Layout, block_size: int, most: int) -> Blocks:
    """The Blocks of a layout; `most` bounds their number in a row (`most_blocks`)."""
    length = tokens.start.shape[1]
    index = tokens.start + tokens.position
    first = tokens.position % block_size == 0
    number = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
    stop = jnp.minimum(index + block_size, tokens.stop)
    return Blocks(
        number=number,
        begin=_scatter(number, index, first, most, 0),
        end=_scatter(number, stop, first, most, 0),
        count=number[:, length - 1] + 1,
    )


def most_blocks(segment_ids: Array | None, length: int, block_size: int) -> int:
    """The most blocks a row can hold: every token may be a segment of its own."""
    return -(-length // block_size) if segment_ids is None else length


def clear_padding(x: Array, segment_ids: Array | None) -> Array:
    """x [B, T, ...] with zeros on padding, so that nothing stored there, NaN included, reaches a product."""
    if segment_ids is None:
        return x
    valid = (segment_ids >= 0).reshape(segment_ids.shape + (1,) * (x.ndim - 2))
    return jnp.where(valid, x, jnp.zeros((), x.dtype))


def clear_empty_slots(x: Array, windows: Intervals) -> Array:
    """x [B, C, ...] with zeros in the slots that hold no window; windows as `window_intervals` gives them."""
    full = (windows.query_end > windows.query_begin).reshape(x.shape[:2] + (1,) * (x.ndim - 2))
    return jnp.where(full, x, jnp.zeros((), x.dtype))


def places(ascending: Array, values: Array, side: str) -> Array:
    """int32, where values would be put; unrolled, since each turn of a loop would be two launches on a GPU."""
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
        TypeError: cu_seqlens is not of an integer dtype.
        ValueError: cu_seqlens is not [n + 1] or [B, n + 1], or length is not a positive int.
    """
    cu_seqlens = jnp.asarray(cu_seqlens)
    if not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise TypeError(f"cu_seqlens: expected an integer dtype, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim not in (1, 2) or cu_seqlens.shape[-1] < 1:
        raise ValueError(f"cu_seqlens: expected shape [n + 1] or [B, n + 1], got {list(cu_seqlens.shape)}")
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length: expected a positive int, got {length!r}")
    return _numbers(cu_seqlens, length)


@one_program
def _numbers(cu_seqlens: Array, length: int) -> Array:
    ends = cu_seqlens.astype(jnp.int32).reshape(-1, cu_seqlens.shape[-1])
    index = jnp.arange(length, dtype=jnp.int32)
    number = jax.vmap(lambda row: places(row, index, "right"))(ends) - 1
    return jnp.where(index[None, :] < ends[:, -1:], number, -1)
