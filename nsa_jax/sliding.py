"""The sliding branch: attention to the last `window_size` tokens of the query's segment."""

import jax

from nsa_jax import checks, interval, reference, segments
from nsa_jax.residuals import nothing_seen
from nsa_jax.runtime import device, transforms
from nsa_jax.runtime.eager import one_program

Array = jax.Array


def sliding_window_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention to a window: the query at position p of a segment sees its keys p - window_size + 1 .. p.

    Source: Yuan et al. 2025, arXiv 2502.11089, section 3.3.3.

    Args:
        query: [B, T, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        window_size: tokens a query sees, itself included. 0: none, the output is zero.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp.

    Returns:
        The output [B, T, N, V] in query's dtype; with return_residual also the lse, float32 [B, T, N], natural log.
        Where a query sees nothing (padding, or window_size 0) the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    checks.attention_arrays(query, key, value)
    window_size = checks.window_size(window_size)
    scale = checks.scale(scale, query)
    segment_ids = checks.segment_ids(segment_ids, query)
    output, lse = _attend(
        query, key, value, segment_ids, window_size, scale, checks.resolve_implementation(implementation)
    )
    return (output, lse) if return_residual else output


@one_program
def _attend(query, key, value, segment_ids, window_size, scale, implementation):
    run = _triton if implementation == "triton" else reference.sliding_window_attention
    output, lse = run(query, key, value, window_size=window_size, scale=scale, segment_ids=segment_ids)
    # zero there already; this drops the cotangent, which may be NaN
    return segments.clear_padding(output, segment_ids), lse


def _triton(query, key, value, *, window_size, scale, segment_ids):
    B, T = query.shape[:2]
    if window_size == 0:
        return nothing_seen(query, value)
    query, key, value, segment_ids = transforms.vary_together((query, key, value, segment_ids))
    query, key, value = (segments.clear_padding(x, segment_ids) for x in (query, key, value))
    intervals = segments.sliding_intervals(segments.layout(segment_ids, B, T), window_size)
    spec = interval.Spec("sliding", scale, device.dot_precision(), reach=min(window_size, T))
    return interval.attend(spec, query, key, value, intervals)
