"""The four attention ops in plain jnp: what the kernels are tested against, and the "xla" implementation.

Arguments arrive checked. Statistics and products are float32, and JAX differentiates everything here, lse included;
the arrays of a query chunk are the largest there are, O(QUERY_CHUNK * T). Letters as in the package docstring;
C = T // stride window slots, t the queries of a chunk, J = cdiv(T, block_size) the most blocks of a segment.

Source: Yuan et al. 2025, arXiv 2502.11089, equations 5 to 12.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nsa_jax.checkpoint_names import name_residuals
from nsa_jax.rows import sight
from nsa_jax.rows.intervals import sliding_intervals, window_intervals
from nsa_jax.rows.queries import Row
from nsa_jax.runtime.partitioning import partitioned

Array = jax.Array

# rows longer than this go through in chunks of as many queries
QUERY_CHUNK = 512
# forced blocks score this less their rank, exact in float32 and above any importance
_FORCED = 2.0**24


def sliding_window_attention(
    query: Array, key: Array, value: Array, row: Row, *, window_size: int, scale: float
) -> tuple[Array, Array]:
    """Each query at p sees the keys p - window_size + 1 .. p of its segment.

    Args:
        query: [B, Tq, N, K].
        key: [B, T, H, K].
        value: [B, T, H, V].
        row: where the queries stand.
        window_size: tokens seen, the query's own included.
        scale: multiplies the scores.

    Returns:
        output [B, Tq, N, V] in the query's dtype, lse float32 [B, Tq, N].
    """
    seen = sliding_intervals(row, window_size)
    keys = _Keys(key, value)
    length = row.length

    def chunk(query, place, begin, end):
        # keys that the chunk's windows touch, where queries stand side by side
        span = length if row.sliced else min(length, query.shape[1] + max(window_size, 1) - 1)
        first = jnp.clip(place[0, 0] - (window_size - 1), 0, length - span) if span < length else 0
        near = keys.cut(first, span) if span < length else keys
        return _attend(query, near, _within(begin - first, end - first, span)[:, None], scale)

    results = _over_queries(chunk, query, row.queries.place, seen.key_begin, seen.key_end)
    return name_residuals("sliding", *results)


def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    row: Row,
    *,
    window: int,
    stride: int,
    scale: float,
) -> tuple[Array, Array]:
    """Each query at p sees the windows c of its segment with c * stride + window - 1 <= p.

    Args:
        query: [B, Tq, N, K].
        compressed_key: [B, C, H, K]; what empty slots hold is ignored.
        compressed_value: [B, C, H, V].
        row: where the queries stand.
        window, stride: tokens in a window, and from one window to the next.
        scale: multiplies the scores.

    Returns:
        output [B, Tq, N, V] in the query's dtype, lse float32 [B, Tq, N].
    """
    seen = window_intervals(row, window, stride)
    keys = _Keys(compressed_key, compressed_value)

    def chunk(query, begin, end):
        return _attend(query, keys, _within(begin, end, keys.count)[:, None], scale)

    return name_residuals("compressed", *_over_queries(chunk, query, seen.key_begin, seen.key_end))


def select_blocks(
    query: Array,
    compressed_key: Array,
    lse: Array,
    row: Row,
    *,
    block_counts: int | Array,
    max_block_count: int,
    block_size: int,
    window: int,
    stride: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Array:
    """The blocks of its segment that each query attends to: the forced ones, then those of most importance.

    Args:
        query: [B, Tq, N, K].
        compressed_key: [B, C, H, K].
        lse: float32 [B, Tq, N], of `compressed_attention`.
        row: where the queries stand.
        block_counts: int or int32 [B, Tq, H], the blocks to choose, clipped to 0 .. max_block_count.
        max_block_count: S.
        block_size: tokens of a block.
        window, stride: tokens in a window, and from one window to the next.
        num_init_blocks, num_local_blocks: the forced blocks, at the segment's start and up to the query's own.
        scale: multiplies the scores.

    Returns:
        int32 [B, Tq, H, S], ascending, then -1. Without gradient.
    """
    query, compressed_key, lse = jax.lax.stop_gradient((query, compressed_key, lse))
    batch, length, heads = *query.shape[:2], compressed_key.shape[2]
    seen = window_intervals(row, window, stride)
    key = sight.clean_rows(compressed_key)
    if key.shape[1] == 0:
        key = jnp.zeros((batch, 1, *key.shape[2:]), key.dtype)  # nobody sees it
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), (batch, length, heads))
    num_blocks = -(-row.length // block_size)
    num_init_blocks = min(num_init_blocks, num_blocks)
    num_local_blocks = min(max(num_local_blocks, 1), num_blocks)

    def chunk(query, lse, begin, end, position, valid, counts):
        visible = _within(begin, end, key.shape[1])[:, None, None]
        lse = _group(lse, heads).transpose(0, 2, 3, 1)[..., None]
        scores = jnp.where(visible, _scores(query, key, scale) - lse, -jnp.inf)
        probability = jnp.exp(scores).sum(axis=2)  # [B, H, t, C]
        importance = _importance(probability, begin, num_blocks, block_size // stride, window // stride)
        importance = jnp.where(importance >= 0, importance, 0.0)  # NaN has no order

        block = _index(num_blocks, 3)
        distance = (position // block_size)[..., None] - block  # [B, t, J]
        is_local = distance < num_local_blocks
        is_forced = is_local | (block < num_init_blocks)
        rank = jnp.where(is_local, distance, num_local_blocks + block)
        ranking = jnp.where(is_forced[:, None], _FORCED - rank[:, None].astype(jnp.float32), importance)
        ranking = jnp.where((distance >= 0)[:, None], ranking, -1.0)

        # [B, H, t, S], ties to the smaller index
        top = functools.partial(jax.lax.top_k, k=min(max_block_count, num_blocks))
        best, chosen = partitioned(top, (ranking,), ("bh",), ["bh", "bh"])
        best, chosen = best.transpose(0, 2, 1, 3), chosen.transpose(0, 2, 1, 3)
        room = _index(chosen.shape[-1], 4) < counts[..., None]
        chosen = jnp.sort(jnp.where((best >= 0) & room & valid[..., None, None], chosen, num_blocks), axis=-1)
        chosen = jnp.where(chosen < num_blocks, chosen, -1)
        return jnp.pad(chosen, ((0, 0),) * 3 + ((0, max_block_count - chosen.shape[-1]),), constant_values=-1)

    queries = row.queries
    return _over_queries(chunk, query, lse, seen.key_begin, seen.key_end, queries.position, queries.valid, counts)


def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    row: Row,
    block_indices: Array,
    *,
    block_counts: int | Array | None,
    block_size: int,
    scale: float,
    unclean: Array | None = None,
) -> tuple[Array, Array]:
    """Each query sees the keys of its listed blocks up to itself.

    Args:
        query: [B, Tq, N, K].
        key: [B, T, H, K].
        value: [B, T, H, V].
        row: where the queries stand.
        block_indices: int32 [B, Tq, H, S], blocks of the query's segment in any order; entries below 0 or beyond the
            query's own block are skipped, a block listed twice counts once.
        block_counts: int, int32 [B, Tq, H] or None: only the first so many entries count.
        block_size: tokens of a block.
        scale: multiplies the scores.
        unclean: bool [B, Tq, H], whose lists come from values that are not finite; None: nobody's.

    Returns:
        output [B, Tq, N, V] in the query's dtype, lse float32 [B, Tq, N].
    """
    length, queries = row.length, row.queries
    keys = _Keys(key, value)
    key_block = row.tokens.position // block_size
    num_blocks = -(-length // block_size)
    if block_counts is None:
        block_counts = block_indices.shape[-1]
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), block_indices.shape[:-1])
    listed = (_index(block_indices.shape[-1], 4) < counts[..., None]) & (block_indices >= 0)
    block_indices = jnp.where(listed, block_indices, num_blocks)
    unclean = jnp.zeros(counts.shape, bool) if unclean is None else unclean

    def chunk(query, block_indices, unclean, start, place, valid):
        block_indices = block_indices.transpose(0, 2, 1, 3)  # [B, H, t, S]
        none = jnp.zeros(num_blocks, bool)
        mark = jax.vmap(jax.vmap(jax.vmap(lambda blocks: none.at[blocks].set(True, mode="drop"))))
        chosen = mark(block_indices)  # [B, H, t, J]
        chosen = jax.vmap(lambda row, block: row[..., block])(chosen, key_block)  # [B, H, t, T]
        causal = _within(start, jnp.where(valid, place + 1, 0), length)
        return _attend(query, keys, chosen & causal[:, None], scale, unclean.transpose(0, 2, 1))

    results = _over_queries(chunk, query, block_indices, unclean, queries.start, queries.place, queries.valid)
    return name_residuals("selected", *results)


class _Keys:
    """Keys [B, C, H, K] and values [B, C, H, V], 0 where a row is not finite; finite: bool [B, C, H]."""

    def __init__(self, key: Array, value: Array):
        self.finite = sight.finite_rows(key) & sight.finite_rows(value)
        self.key, self.value = sight.clear(key, self.finite), sight.clear(value, self.finite)
        self.count = key.shape[1]

    def cut(self, first: Array, count: int) -> "_Keys":
        """`count` keys from `first` on."""
        part = object.__new__(_Keys)
        for name in ("key", "value", "finite"):
            setattr(part, name, jax.lax.dynamic_slice_in_dim(getattr(self, name), first, count, axis=1))
        part.count = count
        return part


@jax.custom_vjp
def _nan_gradient(x: Array, unclean: Array) -> Array:
    """x, whose gradient is NaN where it is unclean."""
    return x


_nan_gradient.defvjp(
    lambda x, unclean: (x, unclean),
    lambda unclean, cotangent: (jnp.where(unclean, jnp.asarray(jnp.nan, cotangent.dtype), cotangent), None),
)


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


def _attend(
    query: Array, keys: _Keys, visible: Array, scale: float, unclean: Array | None = None
) -> tuple[Array, Array]:
    """Softmax attention of [B, t, N, K] over the keys where visible, bool [B, 1 or H, t, keys]: (output, lse).

    A query that sees nothing gives 0 and -inf whatever it holds; one that is not finite, or sees a value that is not,
    or is unclean, bool [B, H, t], gives NaN and leaves the gradients of keys and values alone.
    """
    batch, length, heads = query.shape[:3]
    groups = keys.key.shape[2]

    def of_queries(x):  # [B, H, t] or [B, H, G, t] -> [B, t, N]
        x = jnp.broadcast_to(x[:, :, None] if x.ndim == 3 else x, (batch, groups, heads // groups, length))
        return x.transpose(0, 3, 1, 2).reshape(batch, length, heads)

    sees = jnp.broadcast_to(visible.any(axis=-1), (batch, groups, length))
    lost = (visible & ~keys.finite.transpose(0, 2, 1)[:, :, None]).any(axis=-1)
    lost = lost if unclean is None else lost | unclean
    finite = sight.finite_rows(query)
    lost, sees = of_queries(lost) | ~finite, of_queries(sees)
    query = sight.clear(_nan_gradient(query, (lost & sees)[..., None]), finite)

    scores = jnp.where(visible[:, :, None], _scores(query, keys.key, scale), -jnp.inf)  # [B, H, G, t, keys]
    # zero keys have no maximum, and no visible one has -inf
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    overflown = jnp.isnan(peak) | (peak == jnp.inf)
    lost |= of_queries(overflown)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.where(overflown[..., None], 0.0, jnp.exp(scores - peak[..., None]))
    total = weights.sum(axis=-1)
    total = jnp.where(total == 0, 1.0, total)
    output = jnp.einsum("bhgts,bshv->bthgv", weights, keys.value.astype(jnp.float32), precision=_precision())
    output = output / total.transpose(0, 3, 1, 2)[..., None]
    output = output.reshape(batch, length, heads, keys.value.shape[-1]).astype(query.dtype)
    lse = of_queries(peak + jnp.log(total))
    nothing, nan = jnp.zeros((), output.dtype), jnp.asarray(jnp.nan, output.dtype)
    output = jnp.where(sees[..., None], jnp.where(lost[..., None], nan, output), nothing)
    return output, jnp.where(sees, jnp.where(lost, jnp.nan, lse), -jnp.inf)


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
