"""The four attention ops in plain jnp: what the kernels are tested against, and the "xla" implementation.

Arguments arrive checked. Statistics and products are float32, and JAX differentiates everything here, lse included;
the arrays of a query chunk are the largest there are, O(QUERY_CHUNK * T). Letters as in the package docstring;
C = T // stride window slots, t the queries of a chunk, J = cdiv(T, block_size) the most blocks of a segment.

Source: Yuan et al. 2025, arXiv 2502.11089, equations 5 to 12.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nsa_jax import segments
from nsa_jax.residuals import name_residuals

Array = jax.Array

# rows longer than this go through in chunks of as many queries
QUERY_CHUNK = 512
# forced blocks score this less their rank, exact in float32 and above any importance
_FORCED = 2.0**24


def sliding_window_attention(
    query: Array, key: Array, value: Array, *, window_size: int, scale: float, segment_ids: Array | None
) -> tuple[Array, Array]:
    """Each query at p sees the keys p - window_size + 1 .. p of its segment.

    Args:
        query: [B, T, N, K].
        key: [B, T, H, K].
        value: [B, T, H, V].
        window_size: tokens seen, the query's own included.
        scale: multiplies the scores.
        segment_ids: int32 [B, T] or None.

    Returns:
        output [B, T, N, V] in the query's dtype, lse float32 [B, T, N].
    """
    query, key, value = (segments.clear_padding(x, segment_ids) for x in (query, key, value))
    batch, length = query.shape[:2]
    seen = segments.sliding_intervals(segments.layout(segment_ids, batch, length), window_size)
    index = jnp.broadcast_to(_index(length, 2), (batch, length))

    def chunk(query, index, begin, end):
        span = min(length, query.shape[1] + max(window_size, 1) - 1)  # keys that the chunk's windows touch
        first = jnp.clip(index[0, 0] - (window_size - 1), 0, length - span)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, span, axis=1) for x in (key, value))
        return _attend(query, keys, values, _within(begin - first, end - first, span)[:, None], scale)

    return name_residuals("sliding", *_over_queries(chunk, query, index, seen.key_begin, seen.key_end))


def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    *,
    window: int,
    stride: int,
    scale: float,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    """Each query at p sees the windows c of its segment with c * stride + window - 1 <= p.

    Args:
        query: [B, T, N, K].
        compressed_key: [B, C, H, K]; what empty slots hold is ignored.
        compressed_value: [B, C, H, V].
        window, stride: tokens in a window, and from one window to the next.
        scale: multiplies the scores.
        segment_ids: int32 [B, T] or None.

    Returns:
        output [B, T, N, V] in the query's dtype, lse float32 [B, T, N].
    """
    query = segments.clear_padding(query, segment_ids)
    tokens = segments.layout(segment_ids, *query.shape[:2])
    seen = segments.window_intervals(tokens, window, stride)
    key, value = (segments.clear_empty_slots(x, seen) for x in (compressed_key, compressed_value))

    def chunk(query, begin, end):
        return _attend(query, key, value, _within(begin, end, key.shape[1])[:, None], scale)

    return name_residuals("compressed", *_over_queries(chunk, query, seen.key_begin, seen.key_end))


def select_blocks(
    query: Array,
    compressed_key: Array,
    lse: Array,
    *,
    block_counts: int | Array,
    max_block_count: int,
    block_size: int,
    window: int,
    stride: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
    segment_ids: Array | None,
) -> Array:
    """The blocks of its segment that each query attends to: the forced ones, then those of most importance.

    Args:
        query: [B, T, N, K].
        compressed_key: [B, C, H, K].
        lse: float32 [B, T, N], of `compressed_attention`.
        block_counts: int or int32 [B, T, H], the blocks to choose, clipped to 0 .. max_block_count.
        max_block_count: S.
        block_size: tokens of a block.
        window, stride: tokens in a window, and from one window to the next.
        num_init_blocks, num_local_blocks: the forced blocks, at the segment's start and up to the query's own.
        scale: multiplies the scores.
        segment_ids: int32 [B, T] or None.

    Returns:
        int32 [B, T, H, S], ascending, then -1. Without gradient.
    """
    query, compressed_key, lse = jax.lax.stop_gradient((query, compressed_key, lse))
    batch, length, heads = *query.shape[:2], compressed_key.shape[2]
    query = segments.clear_padding(query, segment_ids)
    tokens = segments.layout(segment_ids, batch, length)
    seen = segments.window_intervals(tokens, window, stride)
    key = segments.clear_empty_slots(compressed_key, seen)
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), (batch, length, heads))
    num_blocks = -(-length // block_size)
    num_init_blocks = min(num_init_blocks, num_blocks)
    num_local_blocks = min(max(num_local_blocks, 1), num_blocks)

    def chunk(query, lse, begin, end, position, valid, counts):
        visible = _within(begin, end, key.shape[1])[:, None, None]
        lse = _group(lse, heads).transpose(0, 2, 3, 1)[..., None]
        scores = jnp.where(visible, _scores(query, key, scale) - lse, -jnp.inf)
        probability = jnp.exp(scores).sum(axis=2)  # [B, H, t, C]
        importance = _importance(probability, begin, num_blocks, block_size // stride, window // stride)

        block = _index(num_blocks, 3)
        distance = (position // block_size)[..., None] - block  # [B, t, J]
        is_local = distance < num_local_blocks
        is_forced = is_local | (block < num_init_blocks)
        rank = jnp.where(is_local, distance, num_local_blocks + block)
        ranking = jnp.where(is_forced[:, None], _FORCED - rank[:, None].astype(jnp.float32), importance)
        ranking = jnp.where((distance >= 0)[:, None], ranking, -1.0)

        # [B, H, t, S], ties to the smaller index
        best, chosen = jax.lax.top_k(ranking, min(max_block_count, num_blocks))
        best, chosen = best.transpose(0, 2, 1, 3), chosen.transpose(0, 2, 1, 3)
        room = _index(chosen.shape[-1], 4) < counts[..., None]
        chosen = jnp.sort(jnp.where((best >= 0) & room & valid[..., None, None], chosen, num_blocks), axis=-1)
        chosen = jnp.where(chosen < num_blocks, chosen, -1)
        return jnp.pad(chosen, ((0, 0),) * 3 + ((0, max_block_count - chosen.shape[-1]),), constant_values=-1)

    return _over_queries(chunk, query, lse, seen.key_begin, seen.key_end, tokens.position, tokens.valid, counts)


def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    block_indices: Array,
    *,
    block_counts: int | Array | None,
    block_size: int,
    scale: float,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    """Each query sees the keys of its listed blocks up to itself.

    Args:
        query: [B, T, N, K].
        key: [B, T, H, K].
        value: [B, T, H, V].
        block_indices: int32 [B, T, H, S], blocks of the query's segment in any order; entries below 0 or beyond the
            query's own block are skipped, a block listed twice counts once.
        block_counts: int, int32 [B, T, H] or None: only the first so many entries count.
        block_size: tokens of a block.
        scale: multiplies the scores.
        segment_ids: int32 [B, T] or None.

    Returns:
        output [B, T, N, V] in the query's dtype, lse float32 [B, T, N].
    """
    query, key, value = (segments.clear_padding(x, segment_ids) for x in (query, key, value))
    length = key.shape[1]
    tokens = segments.layout(segment_ids, *query.shape[:2])
    causal = segments.sliding_intervals(tokens, length)
    key_block = tokens.position // block_size
    num_blocks = -(-length // block_size)
    if block_counts is None:
        block_counts = block_indices.shape[-1]
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), block_indices.shape[:-1])
    listed = (_index(block_indices.shape[-1], 4) < counts[..., None]) & (block_indices >= 0)
    block_indices = jnp.where(listed, block_indices, num_blocks)

    def chunk(query, block_indices, begin, end):
        block_indices = block_indices.transpose(0, 2, 1, 3)  # [B, H, t, S]
        none = jnp.zeros((*block_indices.shape[:-1], num_blocks), bool)
        chosen = jnp.put_along_axis(none, block_indices, True, axis=-1, inplace=False, mode="drop")
        chosen = jax.vmap(lambda row, block: row[..., block])(chosen, key_block)  # [B, H, t, T]
        return _attend(query, key, value, chosen & _within(begin, end, length)[:, None], scale)

    return name_residuals("selected", *_over_queries(chunk, query, block_indices, causal.key_begin, causal.key_end))


def _over_queries(body: Callable, *arrays: Array):
    """body(*arrays), in chunks along axis 1 of all arrays and results where that axis is long."""
    batch, length = arrays[0].shape[:2]
    if length <= QUERY_CHUNK:
        return body(*arrays)
    chunks = -(-length // QUERY_CHUNK)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * QUERY_CHUNK - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, chunks, QUERY_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, chunks * QUERY_CHUNK, *x.shape[3:])[:, :length]

    body = jax.checkpoint(body, prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(lambda chunk: body(*chunk), jax.tree.map(split, arrays)))


def _attend(query: Array, key: Array, value: Array, visible: Array, scale: float) -> tuple[Array, Array]:
    """Softmax attention of [B, t, N, K] over the keys where visible, bool [B, 1 or H, t, keys]: (output, lse)."""
    batch, length, heads = query.shape[:3]
    scores = jnp.where(visible[:, :, None], _scores(query, key, scale), -jnp.inf)  # [B, H, G, t, keys]
    # zero keys have no maximum, and no visible one has -inf
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    output = jnp.einsum("bhgts,bshv->bthgv", weights, value.astype(jnp.float32), precision=_precision())
    output = output / total.transpose(0, 3, 1, 2)[..., None]
    lse = jnp.where(sees, peak + jnp.log(total), -jnp.inf)
    lse = lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)
    return output.reshape(batch, length, heads, -1).astype(query.dtype), lse


def _scores(query: Array, key: Array, scale: float) -> Array:
    """float32 [B, H, G, t, keys]: scaled products of [B, t, N, K] with [B, keys, H, K]."""
    query = _group(query.astype(jnp.float32) * scale, key.shape[2])
    return jnp.einsum("bthgk,bshk->bhgts", query, key.astype(jnp.float32), precision=_precision())


def _importance(probability: Array, begin: Array, num_blocks: int, parts: int, reach: int) -> Array:
    """[B, H, t, J]: probabilities summed over the sub-blocks of each block, every window adding to all it covers.

    Args:
        probability: [B, H, t, C], zero on windows outside the query's segment.
        begin: int32 [B, t], the slot of the segment's first window.
        num_blocks: J.
        parts, reach: sub-blocks (of stride tokens) in a block, in a window.
    """
    length = num_blocks * parts + reach - 1
    padded = jnp.pad(probability, ((0, 0),) * 3 + ((reach - 1, num_blocks * parts),))
    take = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, length, axis=-1), (1, 0), 1)
    windows = jax.vmap(take)(padded, begin)  # [B, H, t, length], window 0 of the segment at reach - 1
    covered = jax.lax.reduce_window(windows, 0.0, jax.lax.add, (1, 1, 1, reach), (1, 1, 1, 1), "VALID")
    return covered.reshape(*covered.shape[:-1], num_blocks, parts).sum(axis=-1)


def _group(x: Array, heads: int) -> Array:
    """[B, t, N, ...] -> [B, t, H, G, ...]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:])


def _within(begin: Array, end: Array, size: int) -> Array:
    """bool [B, t, size]: begin <= index < end."""
    index = _index(size, 3)
    return (index >= begin[..., None]) & (index < end[..., None])


def _index(size: int, ndim: int) -> Array:
    """int32 0 .. size - 1 along the last of ndim axes, the others 1."""
    return jnp.arange(size, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (size,))


def _precision() -> jax.lax.Precision | None:
    """Full float32, unless the user has set JAX's default_matmul_precision."""
    return None if jax.config.jax_default_matmul_precision else jax.lax.Precision.HIGHEST
