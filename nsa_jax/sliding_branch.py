"""The sliding branch: attention to the last `window_size` tokens of the query's segment."""

import functools
from typing import Literal, overload

import jax

from nsa_jax import checks, meshes, reference
from nsa_jax.branches import nothing_seen
from nsa_jax.rows.intervals import sliding_intervals
from nsa_jax.rows.queries import locate
from nsa_jax.runtime.eager import one_program_each

Array = jax.Array


@overload
def sliding_window_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[False] = False,
) -> Array: ...


@overload
def sliding_window_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...


def sliding_window_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention to a window: the query at position p of a segment sees its keys p - window_size + 1 .. p.

    Source: Yuan et al. 2025, arXiv 2502.11089, section 3.3.3.

    Args:
        query: [B, Tq, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        window_size: tokens a query sees, itself included. 0: none, the output is zero.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        query_indices: integers [B, Tq], where in its key row each query stands, in any order; outside of it: padding.
            None: Tq is T, and query i stands at token i.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp.

    Returns:
        The output [B, Tq, N, V] in query's dtype; with return_residual also the lse, float32 [B, Tq, N], natural log.
        Where a query sees nothing (padding, or window_size 0) the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    checks.attention_arrays(query, key, value, checks.query_length(query, query_indices))
    attend = functools.partial(
        _attend,
        checks.window_size(window_size),
        checks.scale(scale, query),
        checks.resolve_implementation(implementation),
    )
    arrays = (
        query,
        key,
        value,
        checks.segment_ids(segment_ids, *key.shape[:2]),
        checks.query_indices(query_indices, query),
    )
    return meshes.partitioned_attention(attend, arrays, return_residual)


@one_program_each
def _attend(window_size, scale, implementation, query, key, value, segment_ids, query_indices):
    """(output, lse) of checked arguments."""
    if window_size == 0:
        return nothing_seen(query, value)
    if implementation == "triton":
        return _triton(window_size, scale, query, key, value, segment_ids, query_indices)
    row = locate(segment_ids, query_indices, *key.shape[:2])
    return reference.sliding_window_attention(query, key, value, row, window_size=window_size, scale=scale)


def _triton(window_size, scale, query, key, value, segment_ids, query_indices):
    from nsa_jax.gpu import backends, interval
    from nsa_jax.runtime import device, transforms

    query, key, value, segment_ids, query_indices = transforms.vary_together(
        (query, key, value, segment_ids, query_indices)
    )
    row = locate(segment_ids, query_indices, *key.shape[:2])
    seen = min(window_size, row.length)
    backend = backends.interval(query, value, scale)
    spec = interval.Spec("sliding", scale, device.dot_precision(), 0 if row.sliced else seen, seen, backend)
    return interval.attend(spec, query, key, value, row, sliding_intervals(row, window_size))
