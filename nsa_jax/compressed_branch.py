"""The compressed branch: attention to the windows of the query's segment that are complete."""

import functools
from typing import Literal, overload

import jax

from nsa_jax import checks, meshes, reference
from nsa_jax.branches import nothing_seen
from nsa_jax.rows.intervals import window_intervals
from nsa_jax.rows.queries import locate
from nsa_jax.runtime.eager import one_program_each

Array = jax.Array


@overload
def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    *,
    window: int,
    stride: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    key_length: int | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[False] = False,
) -> Array: ...


@overload
def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    *,
    window: int,
    stride: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    key_length: int | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...


def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    *,
    window: int,
    stride: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    key_length: int | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention to compressed keys: the query at position p sees window c iff c * stride + window - 1 <= p.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 7.

    Args:
        query: [B, Tq, N, K], bfloat16, float16 or float32.
        compressed_key: [B, T // stride, H, K], of query's dtype; N is a multiple of H. The windows of a row fill the
            slots in row order, as `compress` gives them; what the remaining slots hold is ignored.
        compressed_value: [B, T // stride, H, V], of query's dtype.
        window: tokens in a window, a multiple of stride.
        stride: tokens from the start of one window to the next.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        query_indices: integers [B, Tq], where in its key row each query stands, in any order; outside of it: padding.
            None: Tq is T, and query i stands at token i.
        key_length: T, the tokens of the key row, where query_indices are given and segment_ids do not tell it.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp, which `select_blocks` takes.

    Returns:
        The output [B, Tq, N, V] in query's dtype; with return_residual also the lse, float32 [B, Tq, N], natural log.
        Where a query sees no window the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    window, stride = checks.windows(window, stride)
    length = checks.key_length(key_length, query, query_indices, segment_ids)
    checks.attention_arrays(query, compressed_key, compressed_value, length // stride, prefix="compressed_")
    attend = functools.partial(
        _attend,
        window,
        stride,
        length,
        checks.scale(scale, query),
        checks.resolve_implementation(implementation),
    )
    arrays = (
        query,
        compressed_key,
        compressed_value,
        checks.segment_ids(segment_ids, query.shape[0], length),
        checks.query_indices(query_indices, query),
    )
    return meshes.partitioned_attention(attend, arrays, return_residual)


@one_program_each
def _attend(window, stride, length, scale, implementation, query, key, value, segment_ids, query_indices):
    """(output, lse) of checked arguments."""
    if window > length:
        return nothing_seen(query, value)
    if implementation == "triton":
        return _triton(window, stride, length, scale, query, key, value, segment_ids, query_indices)
    row = locate(segment_ids, query_indices, query.shape[0], length)
    return reference.compressed_attention(query, key, value, row, window=window, stride=stride, scale=scale)


def _triton(window, stride, length, scale, query, key, value, segment_ids, query_indices):
    from nsa_jax.gpu import backends, interval
    from nsa_jax.runtime import device, transforms

    query, key, value, segment_ids, query_indices = transforms.vary_together(
        (query, key, value, segment_ids, query_indices)
    )
    row = locate(segment_ids, query_indices, query.shape[0], length)
    backend = backends.interval(query, value, scale)
    spec = interval.Spec("compressed", scale, device.dot_precision(), 0, key.shape[1], backend)
    return interval.attend(spec, query, key, value, row, window_intervals(row, window, stride))
