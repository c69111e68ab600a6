"""A cache of keys and values: where a row's tokens and windows are kept, how it grows, where its queries stand."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.queries import Queries, Row
from nsa_jax.rows.segments import layout

Array = jax.Array


def _static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B rows that grow, and the compressed keys and values of their complete windows.

    Made by `init_cache`, grown by `extend_cache`, read by `cached_attention`. A pytree: it goes through `jit`, `scan`
    and `while_loop`, and is sharded and saved like any other. Letters as in the package docstring; T is the capacity, P
    the number of pages. What slots hold that no token or window is in has no effect.

    `dataclasses.replace` may change `length` and `page_indices`. A smaller length forgets the tokens behind it
    (speculation), 0 gives the row to another text.

    Attributes:
        key: [B, T, H, K], or [P, page_size, H, K] with pages.
        value: [B, T, H, V], or [P, page_size, H, V].
        compressed_key: [B, T // stride, H, K], or [P, page_size // stride, H, K]: a window is in the page of its first
            token.
        compressed_value: [B, T // stride, H, V], or [P, page_size // stride, H, V].
        length: int32 [B], tokens in each row.
        start: int32 [B], the position of the first of the tokens last appended.
        count: int32 [B], how many were last appended, those that did not fit included.
        page_indices: int32 [B, T // page_size], the page that holds the row's tokens from j * page_size on, any number
            outside of 0 .. P - 1 for none; None without pages.
        layer: int32 [], which of the num_layers caches this is of those that lie one after another in each row of the
            arrays; None where there is one.
        block_size: tokens of a selection block.
        compression_window, compression_stride: tokens of a window, and from one window to the next.
        page_size: tokens of a page, or None.
        num_layers: how many caches lie in each row of the arrays.
        ring_capacity: T, where the arrays keep only a row's last tokens, in a ring, and no windows; None otherwise.
    """

    key: Array
    value: Array
    compressed_key: Array | None
    compressed_value: Array | None
    length: Array
    start: Array
    count: Array
    page_indices: Array | None = None
    layer: Array | None = None
    block_size: int = _static(default=64)
    compression_window: int = _static(default=64)
    compression_stride: int = _static(default=64)
    page_size: int | None = _static(default=None)
    num_layers: int = _static(default=1)
    ring_capacity: int | None = _static(default=None)

    @property
    def batch(self) -> int:
        """B."""
        return self.length.shape[0]

    @property
    def capacity(self) -> int:
        """T, the tokens that a row has room for."""
        if self.ring_capacity is not None:
            return self.ring_capacity
        if self.page_size is not None:
            return self.page_indices.shape[1] * self.page_size
        return self.key.shape[1] // self.num_layers


class Pools(NamedTuple):
    """The arrays of a cache as pages: key [P, S, H, K], page_indices int32 [B, J], S tokens a page, T <= J * S.

    Without page_indices row b is page b.
    """

    key: Array
    value: Array
    compressed_key: Array | None
    compressed_value: Array | None
    page_indices: Array | None


class Place(NamedTuple):
    """Where the queries of each row stand: query i at position start + i, if i < count; int32 [B].

    Attributes:
        start: the position of query 0.
        count: queries that are in the row; those behind are padding.
    """

    start: Array
    count: Array


def pools(cache: KVCache) -> Pools:
    """The arrays as pages, without a copy."""
    arrays = cache.key, cache.value, cache.compressed_key, cache.compressed_value
    if cache.num_layers == 1 and cache.ring_capacity is None:
        return Pools(*arrays, cache.page_indices)
    per_layer, pages = 1, 1  # pages of a row of one layer, and how many a row refers to
    if cache.ring_capacity is not None:
        per_layer = cache.key.shape[1] // cache.num_layers // cache.block_size
        pages = -(-cache.ring_capacity // cache.block_size)
    per_row = cache.num_layers * per_layer
    split = (None if x is None else x.reshape(-1, x.shape[1] // per_row, *x.shape[2:]) for x in arrays)
    number = jnp.arange(pages, dtype=jnp.int32)[None] % per_layer
    row = jnp.arange(cache.batch, dtype=jnp.int32)[:, None] * per_row
    layer = 0 if cache.layer is None else cache.layer * per_layer
    return Pools(*split, row + layer + number)


def room(cache: KVCache) -> Array:
    """int32 [B], how many tokens each row can take: up to the capacity, or to the first page that is unset."""
    start = jnp.maximum(cache.length, 0)
    if cache.page_size is None:
        return jnp.maximum(cache.capacity - start, 0)
    number = jnp.arange(cache.page_indices.shape[1], dtype=jnp.int32)[None]
    unset = ~_is_page(cache, cache.page_indices) & (number >= start[:, None] // cache.page_size)
    first = jnp.where(unset, number, number.shape[1]).min(axis=1, initial=number.shape[1])
    return jnp.maximum(first * cache.page_size - start, 0)


def windows_complete(cache: KVCache, length: Array) -> Array:
    """int32: how many windows rows of so many tokens have."""
    past = length - cache.compression_window
    return jnp.where(past >= 0, past // cache.compression_stride + 1, 0)


def most_windows(cache: KVCache, tokens: int) -> int:
    """How many windows `tokens` consecutive tokens can complete, at most."""
    return -(-tokens // cache.compression_stride)


def extend(cache: KVCache, key: Array, value: Array, count: Array, compressed: tuple[Array, Array] | None) -> KVCache:
    """The cache with the first count, int32 [B], of the tokens of key [B, Tq, H, K] and value [B, Tq, H, V] appended.

    compressed: keys and values [B, most_windows, H, D] of the windows that become complete; None for means.
    """
    start = jnp.maximum(cache.length, 0)
    length = start + jnp.minimum(count, room(cache))
    tokens = key.shape[1]
    position = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    is_token = position < length[:, None]
    if cache.ring_capacity is not None:
        is_token &= position >= length[:, None] - cache.key.shape[1] // cache.num_layers
    cache = dataclasses.replace(
        cache,
        key=_write(cache, cache.key, position, key, is_token),
        value=_write(cache, cache.value, position, value, is_token),
        start=start,
        count=count,
        length=length,
    )
    if cache.compressed_key is None or cache.compression_window > cache.capacity:
        return cache
    most = min(most_windows(cache, tokens), cache.capacity // cache.compression_stride)
    before = windows_complete(cache, start)
    window = before[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    is_window = window < windows_complete(cache, length)[:, None]
    if compressed is None:
        compressed = _mean(cache, cache.key, before, most), _mean(cache, cache.value, before, most)
    compressed_key, compressed_value = (x[:, :most] for x in compressed)
    stride = cache.compression_stride
    return dataclasses.replace(
        cache,
        compressed_key=_write(cache, cache.compressed_key, window, compressed_key, is_window, stride),
        compressed_value=_write(cache, cache.compressed_value, window, compressed_value, is_window, stride),
    )


def read(cache: KVCache, array: Array, index: Array, unit: int = 1) -> Array:
    """[B, X, H, D], what is at index, int32 [B, X], of an array of the cache with a slot every `unit` tokens.

    Of an index outside of the row any other slot.
    """
    page, slot = _address(cache, array, index, unit)
    if page is not None:
        return array.at[page, slot].get(mode="clip")
    return jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(array, slot)


def read_by_head(cache: KVCache, array: Array, position: Array) -> Array:
    """[B, t, H, X, D], each head's tokens at its own positions, int32 [B, t, H, X], of the cache's key or value."""
    page, slot = _address(cache, array, position.reshape(cache.batch, -1), 1)
    slot = slot.reshape(position.shape)
    if page is None:
        axes, index = (0,), slot[..., None]  # axes of the array that go along with axes of the index, beside the heads
    else:
        axes, index = (), jnp.stack([page.reshape(position.shape), slot], axis=-1)
    looked_up = tuple(axis for axis in (0, 1) if axis not in axes)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(4,),
        collapsed_slice_dims=looked_up,
        start_index_map=looked_up,
        operand_batching_dims=(*axes, 2),
        start_indices_batching_dims=(*axes, 2),
    )
    sizes = (1, 1, 1, array.shape[3])
    return jax.lax.gather(array, index, numbers, sizes, mode=jax.lax.GatherScatterMode.CLIP)


def whole_rows(cache: KVCache, array: Array, unit: int = 1) -> Array:
    """[B, T // unit, H, D], an array of the cache as rows: itself where it is that already, else a copy."""
    size = cache.capacity // unit
    if cache.page_size is not None:
        pages = array.at[cache.page_indices].get(mode="clip")  # [B, J, page_size // unit, H, D]
        return pages.reshape(cache.batch, size, *array.shape[2:])
    if cache.layer is None:
        return array
    return jax.lax.dynamic_slice_in_dim(array, cache.layer * size, size, axis=1)


def placement(cache: KVCache, queries: int) -> tuple[Place, Array]:
    """Where the tokens last appended stand, and which of `queries` did not fit, bool [B, queries]."""
    place = Place(cache.start, jnp.clip(jnp.minimum(cache.count, cache.length - cache.start), 0, queries))
    number = jnp.arange(queries, dtype=jnp.int32)[None]
    lost = (number < cache.count[:, None]) & (number >= place.count[:, None])
    return place, lost | (cache.count > queries)[:, None]


def row_of(place: Place, queries: int, capacity: int) -> Row:
    """The Row of cached rows and the queries that stand in them, one segment each, nothing of it looked up."""
    batch = place.start.shape[0]
    number = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32), (batch, queries))
    valid = number < place.count[:, None]
    position = jnp.where(valid, place.start[:, None] + number, capacity - 1)
    standing = jnp.where(valid, position, capacity)
    start, stop = jnp.zeros_like(position), jnp.full_like(position, capacity)
    where = Queries(position, start, stop, position, valid, order=number, standing=standing)
    return Row(layout(None, batch, capacity), where, packed=False)


def _is_page(cache: KVCache, page: Array) -> Array:
    return (page >= 0) & (page < cache.key.shape[0])


def _address(cache: KVCache, array: Array, index: Array, unit: int) -> tuple[Array | None, Array]:
    """(page or None, slot) of what is at index, int32 [B, X], of an array with a slot every `unit` tokens.

    Where there is no page its number is out of the array.
    """
    if cache.page_size is None:
        size = array.shape[1] // cache.num_layers
        index = jnp.clip(index, 0, size - 1) if cache.ring_capacity is None else index % size
        return None, index if cache.layer is None else cache.layer * size + index
    per_page = cache.page_size // unit
    number = jnp.clip(index // per_page, 0, cache.page_indices.shape[1] - 1)
    page = jnp.take_along_axis(cache.page_indices, number, axis=1)
    return jnp.where(_is_page(cache, page), page, cache.key.shape[0]), index % per_page


def _write(cache: KVCache, array: Array, index: Array, values: Array, keep: Array, unit: int = 1) -> Array:
    """The array of the cache with values [B, X, H, D] at index, int32 [B, X], where keep, bool [B, X]."""
    values = values.astype(array.dtype)
    options = {"mode": "drop", "unique_indices": True}  # what is dropped has places of its own, outside of the array
    page, slot = _address(cache, array, index, unit)
    if page is not None:
        outside = jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
        page, slot = jnp.where(keep, page, array.shape[0]), jnp.where(keep, slot, array.shape[1] + outside)
        return array.at[page, slot].set(values, **options)
    outside = array.shape[1] + jnp.arange(index.shape[1], dtype=jnp.int32)[None]
    return jax.vmap(lambda row, at, x: row.at[at].set(x, **options))(array, jnp.where(keep, slot, outside), values)


def _mean(cache: KVCache, array: Array, first: Array, count: int) -> Array:
    """[B, count, H, D], the means over the windows from the first, int32 [B], on; of incomplete ones anything."""
    window, stride = cache.compression_window, cache.compression_stride
    reach = window // stride
    strides = count + reach - 1  # that the windows cover
    position = first[:, None] * stride + jnp.arange(strides * stride, dtype=jnp.int32)[None]
    parts = read(cache, array, position).reshape(cache.batch, strides, stride, *array.shape[2:])
    parts = parts.sum(axis=2, dtype=jnp.float32)
    return (sum(parts[:, i : i + count] for i in range(reach)) / window).astype(array.dtype)
