"""The compressed branch: attention to the windows of the query's segment that are complete."""

import jax

from nsa_jax import checks, interval, reference, segments
from nsa_jax.residuals import nothing_seen
from nsa_jax.runtime import device, transforms
from nsa_jax.runtime.eager import one_program

Array = jax.Array


def compressed_attention(
    query: Array,
    compressed_key: Array,
    compressed_value: Array,
    *,
    window: int,
    stride: int,
    scale: float | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention to compressed keys: the query at position p sees window c iff c * stride + window - 1 <= p.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 7.

    Args:
        query: [B, T, N, K], bfloat16, float16 or float32.
        compressed_key: [B, T // stride, H, K], of query's dtype; N is a multiple of H. The windows of a row fill the
            slots in row order, as `compress` gives them; what the remaining slots hold is ignored.
        compressed_value: [B, T // stride, H, V], of query's dtype.
        window: tokens in a window, a multiple of stride.
        stride: tokens from the start of one window to the next.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp, which `select_blocks` takes.

    Returns:
        The output [B, T, N, V] in query's dtype; with return_residual also the lse, float32 [B, T, N], natural log.
        Where a query sees no window the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    window, stride = checks.windows(window, stride)
    checks.attention_arrays(query, compressed_key, compressed_value, prefix="compressed_", stride=stride)
    scale = checks.scale(scale, query)
    segment_ids = checks.segment_ids(segment_ids, query)
    implementation = checks.resolve_implementation(implementation)
    output, lse = _attend(query, compressed_key, compressed_value, segment_ids, window, stride, scale, implementation)
    return (output, lse) if return_residual else output


@one_program
def _attend(query, key, value, segment_ids, window, stride, scale, implementation):
    run = _triton if implementation == "triton" else reference.compressed_attention
    output, lse = run(query, key, value, window=window, stride=stride, scale=scale, segment_ids=segment_ids)
    # zero there already; this drops the cotangent, which may be NaN
    return segments.clear_padding(output, segment_ids), lse


def _triton(query, key, value, *, window, stride, scale, segment_ids):
    B, T = query.shape[:2]
    if window > T:
        return nothing_seen(query, value)
    query, key, value, segment_ids = transforms.vary_together((query, key, value, segment_ids))
    tokens = segments.layout(segment_ids, B, T)
    intervals = segments.window_intervals(tokens, window, stride)
    query = segments.clear_padding(query, segment_ids)
    key, value = (segments.clear_empty_slots(x, intervals) for x in (key, value))
    spec = interval.Spec("compressed", scale, device.dot_precision())
    return interval.attend(spec, query, key, value, intervals)
