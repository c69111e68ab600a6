"""Attention of the last tokens of cached rows in plain jnp; of a few queries at the cost of the tokens they read.

Letters as in the package docstring; T is the capacity of a row.
"""

import jax
import jax.numpy as jnp

from nsa_jax import branches, reference
from nsa_jax.branches import Arrays, Config, PerBranch, Routing
from nsa_jax.reference_branches import Reference
from nsa_jax.rows.cache import KVCache, Place, read, read_by_head, row_of, whole_rows
from nsa_jax.rows.queries import locate

Array = jax.Array


def attend(
    config: Config, query: Array, cache: KVCache, gates: PerBranch, block_counts: Array | None, place: Place
) -> Array:
    """[B, Tq, N, V], the gated sum of the branches, 0 for padding; long chunks go through in parts.

    Args:
        config: static arguments.
        query: [B, Tq, N, K].
        cache: the rows, the queries' own tokens in them.
        gates: [B, Tq, N] each, or None.
        block_counts: int32 [B, Tq, H], or None for config.max_block_count.
        place: where the queries stand.
    """
    batch, length = query.shape[:2]
    size = reference.QUERY_CHUNK
    if length <= size:
        return _attend(config, query, cache, gates, block_counts, place)
    parts = -(-length // size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, parts * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, parts, size, *x.shape[2:]).swapaxes(0, 1)

    def part(arrays):
        number, query, gates, counts = arrays
        before = number * size
        here = Place(place.start + before, jnp.clip(place.count - before, 0, size))
        return _attend(config, query, cache, gates, counts, here)

    arrays = jnp.arange(parts, dtype=jnp.int32), *jax.tree.map(split, (query, gates, block_counts))
    output = jax.lax.map(part, arrays).swapaxes(0, 1)
    return output.reshape(batch, parts * size, *output.shape[3:])[:, :length]


def _attend(config, query, cache, gates, block_counts, place) -> Array:
    compressed = None, None
    if branches.needs_windows(config, gates):
        compressed = (whole_rows(cache, x, config.stride) for x in (cache.compressed_key, cache.compressed_value))
    arrays = Arrays(query, cache.key, cache.value, *compressed)
    routing = Routing(None, None, None, None)
    outputs, _ = branches.run(_Cached(config, arrays, cache, block_counts, place), config, arrays, gates, routing)
    return branches.gated_sum(gates, outputs, query, cache.value)


class _Cached(Reference):
    """The branches of cached rows: what a few queries select or have near is taken out of the rows first."""

    def __init__(self, config: Config, arrays: Arrays, cache: KVCache, block_counts: Array | None, place: Place):
        counts = config.max_block_count if block_counts is None else block_counts
        super().__init__(config, arrays, counts, row_of(place, arrays.query.shape[1], cache.capacity))
        self.cache, self.place = cache, place

    def selected(self, block_indices: Array, block_counts: Array | None, lse: Array) -> tuple[Array, Array]:
        query, cache, config = self.arrays.query, self.cache, self.config
        unclean = branches.tainted(lse, block_indices.shape[2])
        options = {"block_size": config.block_size, "scale": config.scale}
        most = block_indices.shape[-1]
        if query.shape[1] * most * config.block_size > cache.capacity:
            key, value = whole_rows(cache, cache.key), whole_rows(cache, cache.value)
            return reference.selected_attention(
                query, key, value, self.row, block_indices, block_counts=block_counts, unclean=unclean, **options
            )
        return _attend_gathered(query, cache, self.row.queries, block_indices, unclean, **options)

    def nearest(self, window_size: int) -> tuple[Array, Array]:
        """Attention to the tokens that the windows of all queries cover, taken out of the row."""
        query, cache, place = self.arrays.query, self.cache, self.place
        reach = min(window_size, cache.capacity)
        queries = query.shape[1]
        span = min(queries + reach - 1, cache.capacity)
        first = jnp.clip(place.start - (reach - 1), 0, cache.capacity - span)
        position = first[:, None] + jnp.arange(span, dtype=jnp.int32)[None]
        whole = span == cache.capacity and cache.ring_capacity is None
        near = (whole_rows(cache, x) if whole else read(cache, x, position) for x in (cache.key, cache.value))
        row = row_of(Place(place.start - first, place.count), queries, span)
        return reference.sliding_window_attention(query, *near, row, window_size=reach, scale=self.config.scale)


def _attend_gathered(query, cache, queries, block_indices, unclean, *, block_size, scale) -> tuple[Array, Array]:
    """`reference.selected_attention` of ascending block_indices, which end in the query's own block and then in -1.

    Each query and kv head gets a row of its own, the listed blocks one after another.
    """
    batch, length, heads, most = block_indices.shape
    token = jnp.arange(block_size, dtype=jnp.int32).reshape(1, 1, 1, 1, block_size)
    position = (block_indices[..., None] * block_size + token).reshape(batch, length, heads, most * block_size)
    key, value = (read_by_head(cache, x, jnp.maximum(position, 0)) for x in (cache.key, cache.value))
    listed = block_indices >= 0
    own = (listed.sum(axis=-1, dtype=jnp.int32) - 1) * block_size + (queries.position % block_size)[..., None]
    own = jnp.where(queries.valid[..., None] & listed.any(axis=-1), own, -1)  # [B, t, H]
    blocks = jnp.where(listed, jnp.arange(most, dtype=jnp.int32).reshape(1, 1, 1, most), -1)

    def attend(query, key, value, own, blocks, unclean):  # [B, G, K], [B, X, K], [B, X, V], [B], [B, S], [B]
        row = locate(None, own[:, None], batch, most * block_size)
        output, lse = reference.selected_attention(
            query[:, None],
            key[:, :, None],
            value[:, :, None],
            row,
            blocks[:, None, None],
            block_counts=None,
            block_size=block_size,
            scale=scale,
            unclean=unclean[:, None, None],
        )
        return output[:, 0], lse[:, 0]

    groups = query.shape[2] // heads
    query = query.reshape(batch, length, heads, groups, query.shape[3])
    by_query = jax.vmap(jax.vmap(attend, in_axes=1, out_axes=1), in_axes=1, out_axes=1)
    output, lse = by_query(query, key, value, own, blocks, unclean)
    return output.reshape(batch, length, heads * groups, -1), lse.reshape(batch, length, heads * groups)
