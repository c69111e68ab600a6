"""Decoding: a cache of keys and values, and attention of the tokens last appended to it."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nsa_jax import cached_reference, checks, meshes
from nsa_jax.attention import checked_gates
from nsa_jax.branches import Arrays, Config, Routing, needs_windows
from nsa_jax.rows import cache as rows
from nsa_jax.rows.cache import KVCache
from nsa_jax.rows.segments import clear_padding
from nsa_jax.runtime.eager import one_program

Array = jax.Array

# that the kernels for few queries take at most
FEW_QUERIES = 8
# fields that extend_cache gives anew
_GROWN = ("key", "value", "compressed_key", "compressed_value", "length", "start", "count")


def init_cache(
    batch: int,
    capacity: int,
    num_kv_heads: int,
    key_width: int,
    value_width: int | None = None,
    *,
    block_size: int = 64,
    compression_window: int | None = None,
    compression_stride: int | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    page_size: int | None = None,
    num_pages: int | None = None,
) -> KVCache:
    """An empty cache.

    Args:
        batch: B, rows.
        capacity: T, the tokens that a row has room for.
        num_kv_heads: H.
        key_width, value_width: K and V; V is K unless given.
        block_size: tokens of a selection block, a power of two from 16 to 128.
        compression_window: tokens in a compression window, at most block_size; block_size unless given.
        compression_stride: tokens from one window to the next, a divisor of the window and of block_size; block_size
            unless given.
        dtype: of keys and values.
        page_size: tokens of a page, a multiple of block_size and a divisor of capacity; None: each row has room of its
            own. With pages all rows share one pool, and `page_indices`, int32 [B, capacity // page_size], which begin
            as -1 and are the caller's to set (`dataclasses.replace`), say where a row's pages are. Rows may share pages
            that none of them appends to.
        num_pages: P, pages in the pool; as many as the rows can hold unless given.

    Returns:
        A `KVCache` of length 0.

    Raises:
        ValueError, TypeError: an argument is out of range or of a wrong type.
    """
    batch = checks.integer("batch", batch, 0, checks.MOST_INT)
    capacity = checks.integer("capacity", capacity, 1, checks.MOST_INT)
    heads = checks.integer("num_kv_heads", num_kv_heads, 1, checks.MOST_INT)
    key_width = checks.head_width("key_width", key_width)
    value_width = key_width if value_width is None else checks.head_width("value_width", value_width)
    block_size = checks.block_size(block_size)
    window, stride = checks.windows(
        block_size if compression_window is None else compression_window,
        block_size if compression_stride is None else compression_stride,
        block_size,
        names=("compression_window", "compression_stride"),
    )
    dtype = checks.float_dtype("dtype", dtype)
    count, size, page_indices = batch, capacity, None
    if page_size is not None:
        size = page_size = checks.page_size(page_size, block_size, capacity)
        per_row = capacity // page_size
        count = batch * per_row if num_pages is None else checks.integer("num_pages", num_pages, 1, checks.MOST_INT)
        page_indices = jnp.full((batch, per_row), -1, jnp.int32)
    elif num_pages is not None:
        raise ValueError("page_size: expected the tokens of a page, as num_pages is given, got None")

    def zeros(slots: int, width: int) -> Array:
        return jnp.zeros((count, slots, heads, width), dtype)

    return KVCache(
        key=zeros(size, key_width),
        value=zeros(size, value_width),
        compressed_key=zeros(size // stride, key_width),
        compressed_value=zeros(size // stride, value_width),
        length=jnp.zeros(batch, jnp.int32),
        start=jnp.zeros(batch, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        page_indices=page_indices,
        block_size=block_size,
        compression_window=window,
        compression_stride=stride,
        page_size=page_size,
    )


def extend_cache(
    cache: KVCache,
    key: Array,
    value: Array,
    *,
    lengths: Array | None = None,
    compressed: tuple[Array, Array] | None = None,
) -> KVCache:
    """Appends tokens to the rows of a cache, each at the row's own length, and pools the windows that became complete.

    Under `jax.jit` with the cache donated, and in the loops of `jax.lax`, the arrays are changed in place.

    A token does not fit beyond the capacity, or where the row has no page. It and those behind it are left out:
    `length` stops before it, nothing else is changed, and the outputs of `cached_attention` for what was left out are
    NaN. Outside of `jax.jit` there is an error instead. Once there is room the tokens may be appended again.

    Args:
        cache: the cache.
        key: [B, Tq, H, K], of the cache's dtype.
        value: [B, Tq, H, V], of the cache's dtype.
        lengths: integers [B] from 0 to Tq: only the first so many tokens of a row are appended; all unless given.
        compressed: keys [B, M, H, K] and values [B, M, H, V] of the windows that become complete, from a map of your
            own, with M = ceil(Tq / compression_stride), the most there can be. Before, a row of `length` tokens has
            n = max(0, (length - window) // stride + 1) complete windows: entry i is of window n + i, the row's tokens
            from (n + i) * stride on; entries of windows that are not complete have no effect. The mean of the cache's
            keys and values unless given.

    Returns:
        The cache with the tokens in it; it remembers which they were, for `cached_attention`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype, or, outside of `jax.jit`, a token does not
            fit.
    """
    cache = _checked(cache)
    checks.appended("key", key, cache, "Tq", cache.key)
    tokens = key.shape[1]
    checks.appended("value", value, cache, tokens, cache.value)
    if lengths is not None:
        lengths = checks.row_lengths("lengths", lengths, cache.batch)
    if compressed is not None:
        if not isinstance(compressed, tuple | list) or len(compressed) != 2:
            raise TypeError("compressed: expected a pair of keys and values, got " + type(compressed).__name__)
        most = rows.most_windows(cache, tokens)
        for name, x, like in zip(("keys", "values"), compressed, (cache.key, cache.value), strict=True):
            checks.appended(f"compressed {name}", x, cache, most, like)
        compressed = tuple(compressed)
    _check_room(cache, tokens, lengths)
    leaves, tree = jax.tree.flatten((cache, key, value, lengths, compressed))
    names = [name for name in _FIELDS if getattr(cache, name) is not None]

    def specs(*axes):
        return {name: PartitionSpec(*axis) for name, axis in zip(names, axes, strict=False) if name in _GROWN}

    grown = meshes.partitioned(functools.partial(_extend, tree), tuple(leaves), specs)
    return dataclasses.replace(cache, **grown)


_FIELDS = tuple(field.name for field in dataclasses.fields(KVCache) if not field.metadata.get("static"))


@one_program
def _extend(tree, *leaves: Array) -> dict[str, Array]:
    """The fields _GROWN of the cache that are not None, of checked arguments."""
    cache, key, value, lengths, compressed = jax.tree.unflatten(tree, leaves)
    tokens = jnp.full(cache.batch, key.shape[1], jnp.int32)
    count = tokens if lengths is None else jnp.clip(lengths, 0, tokens)
    cache = rows.extend(cache, key, value, count, compressed)
    return {name: getattr(cache, name) for name in _GROWN if getattr(cache, name) is not None}


def cached_attention(
    query: Array,
    cache: KVCache,
    *,
    compressed_gate: Array | float | None = None,
    selected_gate: Array | float | None = None,
    sliding_gate: Array | float | None = None,
    block_counts: int | Array = 16,
    window_size: int = 512,
    num_init_blocks: int = 1,
    num_local_blocks: int = 2,
    max_block_count: int | None = None,
    scale: float | None = None,
    implementation: Literal["triton", "xla"] | None = None,
) -> Array:
    """`native_sparse_attention` of the tokens last appended to a cache.

    However a text is cut into what `extend_cache` gets at a time, its outputs are those for all of it at once. A row is
    one segment. Blocks and compression windows have the cache's sizes.

    Args:
        query: [B, Tq, N, K], of the tokens that `extend_cache` last appended, in the cache's dtype.
        cache: what `extend_cache` gave.
        compressed_gate, selected_gate, sliding_gate: [B, Tq, N], of a float dtype, or a number; None drops the branch.
        block_counts: blocks per query, an int or integers [B, Tq, H].
        window_size: tokens the sliding branch sees, the query's own included; 0 drops the branch.
        num_init_blocks: first blocks of the row that are always selected.
        num_local_blocks: last blocks that are always selected, the query's own included.
        max_block_count: the most blocks a query can select, where block_counts is an array.
        scale: factor on the scores, K ** -0.5 unless given.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.

    Returns:
        [B, Tq, N, V] in query's dtype: the sum of gate * output over the three branches. 0 for a row's tokens beyond
        its `lengths`; NaN for tokens that did not fit into the cache, and in rows to which more than Tq were appended.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype, no gate is given, or, outside of
            `jax.jit`, more than Tq tokens were appended.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    cache = _checked(cache)
    checks.cache_fits(cache, query)
    gates = checked_gates(query, compressed_gate, selected_gate, sliding_gate)
    num_init_blocks, num_local_blocks = checks.forced_blocks(num_init_blocks, num_local_blocks)
    block_counts = checks.block_counts(block_counts, query, cache.key)
    num_blocks = -(-cache.capacity // cache.block_size)
    max_block_count = num_blocks if max_block_count is None else checks.max_block_count(max_block_count)
    selects_all = isinstance(block_counts, int) and block_counts >= num_blocks
    if isinstance(block_counts, int):
        max_block_count, block_counts = min(max_block_count, block_counts), None
    config = Config(
        scale=checks.scale(scale, query),
        block_size=cache.block_size,
        window_size=checks.window_size(window_size),
        window=cache.compression_window,
        stride=cache.compression_stride,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        max_block_count=min(max_block_count, num_blocks),
        selects_all=selects_all and max_block_count >= num_blocks,
    )
    if config.window_size == 0:
        gates = gates._replace(sliding=None)
    appended = _known(cache.count)
    if appended is not None and (appended > query.shape[1]).any():
        raise ValueError(
            f"query: expected the {appended.max()} tokens that were last appended, got {query.shape[1]} tokens"
        )
    leaves, tree = jax.tree.flatten((query, cache, gates, block_counts))
    attend = functools.partial(_attend, config, checks.resolve_implementation(implementation), tree)
    return meshes.partitioned(attend, tuple(leaves), lambda *axes: meshes.attention_specs(*axes)[0])


@one_program
def _attend(config: Config, implementation: str, tree, *leaves: Array) -> Array:
    """`cached_attention` of checked arguments."""
    query, cache, gates, block_counts = jax.tree.unflatten(tree, leaves)
    queries = query.shape[1]
    if implementation == "triton" and queries <= FEW_QUERIES:
        return _few(config, query, cache, gates, block_counts)
    place, lost = rows.placement(cache, queries)
    is_placed = jnp.arange(queries, dtype=jnp.int32)[None] < place.count[:, None]
    gates = jax.tree.map(lambda gate: clear_padding(jnp.broadcast_to(gate, query.shape[:3]), is_placed), gates)
    attend = _triton if implementation == "triton" else cached_reference.attend
    output = attend(config, query, cache, gates, block_counts, place)
    return jnp.where(lost[..., None, None], jnp.asarray(jnp.nan, output.dtype), output)


def _few(config, query, cache, gates, block_counts) -> Array:
    """`_attend` of a few queries by kernels of their own, which also see to padding and to what did not fit."""
    from nsa_jax.gpu import decode

    gates = jax.tree.map(lambda gate: jnp.broadcast_to(gate, query.shape[:3]), gates)
    counts = config.max_block_count if block_counts is None else block_counts
    return decode.attend(config, query, *rows.pools(cache), cache.start, cache.count, gates, counts, cache.length)


def _triton(config, query, cache, gates, block_counts, place) -> Array:
    """[B, Tq, N, V], 0 for padding, by the kernels for whole rows."""
    from nsa_jax.gpu import whole

    counts = config.max_block_count if block_counts is None else block_counts
    number = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    is_placed = number < place.count[:, None]
    query, query_indices = clear_padding(query, is_placed), jnp.where(is_placed, place.start[:, None] + number, -1)
    units = {"key": 1, "value": 1, "compressed_key": config.stride, "compressed_value": config.stride}
    if not needs_windows(config, gates):
        units = {"key": 1, "value": 1}
    arrays = {name: rows.whole_rows(cache, getattr(cache, name), unit) for name, unit in units.items()}
    arrays = Arrays(query, **{"compressed_key": None, "compressed_value": None, **arrays})
    return whole.attend(config, arrays, gates, Routing(None, query_indices, None, checks.as_int32(counts)))


def _checked(cache: KVCache) -> KVCache:
    """The cache, with integers as int32."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    batch = cache.start.shape[0]
    integers = {"length": checks.row_lengths("cache.length", cache.length, batch)}
    if cache.page_size is not None:
        integers["page_indices"] = checks.page_indices(cache.page_indices, batch)
    return dataclasses.replace(cache, **integers)


def _known(array: Array) -> np.ndarray | None:
    """The numbers in the array; None where they are traced, or on other hosts."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def _check_room(cache: KVCache, tokens: int, lengths: Array | None) -> None:
    """Raises if it is known that a token does not fit."""
    count = np.int32(tokens) if lengths is None else _known(lengths)
    if count is None:
        return
    wrong = np.flatnonzero(np.atleast_1d((count < 0) | (count > tokens)))
    if len(wrong):
        raise ValueError(f"lengths: expected 0 to the {tokens} tokens of key, got {count[wrong[0]]} in row {wrong[0]}")
    known = [_known(x) for x in (cache.length, cache.page_indices) if x is not None]
    if any(x is None for x in known):
        return
    room = np.asarray(rows.room(cache))
    lacking = np.flatnonzero(count > room)
    if len(lacking):
        row = lacking[0]
        count, length = np.broadcast_to(count, room.shape)[row], known[0][row]
        why = f"the capacity is {cache.capacity}"
        if cache.page_size is not None and length + room[row] < cache.capacity:
            why = f"page_indices are unset from token {length + room[row]} on"
        raise ValueError(f"cache: expected room for {count} more tokens in row {row} of length {length}, but {why}")
