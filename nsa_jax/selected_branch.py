"""Selected attention: every query attends to the blocks chosen for it (arXiv 2502.11089, equation 12)."""

import functools
from typing import Literal, overload

import jax

from nsa_jax import checks, meshes, reference
from nsa_jax.rows.queries import locate
from nsa_jax.runtime.eager import one_program_each

Array = jax.Array


@overload
def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    block_indices: Array,
    *,
    block_counts: Array | int | None = None,
    block_size: int = 64,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[False] = False,
) -> Array: ...


@overload
def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    block_indices: Array,
    *,
    block_counts: Array | int | None = None,
    block_size: int = 64,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...


def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    block_indices: Array,
    *,
    block_counts: Array | int | None = None,
    block_size: int = 64,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    implementation: Literal["triton", "xla"] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention to the listed blocks of the query's segment.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 12 and section 3.4.

    Args:
        query: [B, Tq, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        block_indices: integers [B, Tq, H, S], counted from the segment's first token: block j holds its positions
            [j * block_size, (j + 1) * block_size). An entry below 0 or beyond the query's own block is skipped, one
            that is listed twice counts once; the order does not matter.
        block_counts: how many of the first entries count: None for all, an int, or integers [B, Tq, H].
        block_size: tokens in a block, a power of two from 16 to 128.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        query_indices: integers [B, Tq], where in its key row each query stands, in any order; outside of it: padding.
            None: Tq is T, and query i stands at token i.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp.

    Returns:
        The output [B, Tq, N, V] in query's dtype; with return_residual also the lse, float32 [B, Tq, N], natural log.
        Where a query sees nothing the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    checks.attention_arrays(query, key, value, checks.query_length(query, query_indices))
    block_indices = checks.block_indices(block_indices, query, key)
    if block_counts is not None:
        block_counts = checks.as_int32(checks.block_counts(block_counts, query, key))
    attend = functools.partial(
        _attend,
        checks.block_size(block_size),
        checks.scale(scale, query),
        checks.resolve_implementation(implementation),
    )
    arrays = (
        query,
        key,
        value,
        block_indices,
        block_counts,
        checks.segment_ids(segment_ids, *key.shape[:2]),
        checks.query_indices(query_indices, query),
    )
    return meshes.partitioned_attention(attend, arrays, return_residual)


@one_program_each
def _attend(block_size, scale, implementation, query, key, value, block_indices, block_counts, *places):
    """(output, lse) of checked arguments; places: segment_ids and query_indices."""
    if implementation == "triton":
        return _triton(block_size, scale, query, key, value, block_indices, block_counts, *places)
    row = locate(*places, *key.shape[:2])
    return reference.selected_attention(
        query, key, value, row, block_indices, block_counts=block_counts, block_size=block_size, scale=scale
    )


def _triton(block_size, scale, *arrays):
    from nsa_jax.gpu import backends, selected
    from nsa_jax.gpu.walks import choose
    from nsa_jax.runtime import device, transforms

    query, key, value, block_indices, block_counts, *places = transforms.vary_together(arrays)
    row = locate(*places, *key.shape[:2])
    choice = choose(row, block_indices, block_counts, block_size)
    backend = backends.selected(query, value, scale, block_size, 0)
    spec = selected.Spec(block_size, scale, device.dot_precision(), 0, backend)
    return selected.attend(spec, query, key, value, choice)
