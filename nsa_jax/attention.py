"""Native Sparse Attention: the compressed, selected and sliding branches, gated and added."""

import jax
import jax.numpy as jnp

from nsa_jax import checks, fused, reference, segments
from nsa_jax.compression import compress
from nsa_jax.runtime.eager import one_program

Array = jax.Array


def native_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    compressed_gate: Array | None = None,
    selected_gate: Array | None = None,
    sliding_gate: Array | None = None,
    block_indices: Array | None = None,
    block_counts: int | Array = 16,
    block_size: int = 64,
    window_size: int = 512,
    compression_window: int | None = None,
    compression_stride: int | None = None,
    compressed_key: Array | None = None,
    compressed_value: Array | None = None,
    num_init_blocks: int = 1,
    num_local_blocks: int = 2,
    max_block_count: int | None = None,
    scale: float | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Causal attention through three gated branches: compressed keys, selected blocks of keys, and a sliding window.

    Source: Yuan et al. 2025, arXiv 2502.11089, equations 5 to 12.

    Args:
        query: [B, T, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        compressed_gate, selected_gate, sliding_gate: [B, T, N], of a float dtype; None drops the branch.
        block_indices: integers [B, T, H, S], the blocks to attend to, see `selected_attention`; None selects them by
            the compressed probabilities, see `select_blocks`.
        block_counts: blocks per query, an int or integers [B, T, H]. Of given block_indices the first block_counts
            count.
        block_size: tokens in a block, a power of two from 16 to 128.
        window_size: tokens the sliding branch sees, the query's own included; 0 drops the branch.
        compression_window: tokens in a compression window, at most block_size; block_size unless given.
        compression_stride: tokens from one window to the next, a divisor of the window and of block_size; block_size
            unless given.
        compressed_key: [B, T // compression_stride, H, K], from a map of your own; the mean (`compress`) unless given.
        compressed_value: [B, T // compression_stride, H, V], likewise; both or none.
        num_init_blocks: first blocks of the segment that are always selected.
        num_local_blocks: last blocks that are always selected, the query's own included.
        max_block_count: the most blocks a query can select, where block_counts is an array; what it counts beyond is
            cut.
            Unless given the number of blocks in T tokens: give it where T is large, since memory grows with it.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; everything is relative to a run of equal ids, negative ids are padding. May change
            at every call without a new compilation. None: every row is one segment.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.

    Returns:
        [B, T, N, V] in query's dtype: compressed_gate * compressed + selected_gate * selected + sliding_gate * sliding.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype, or no gate is given.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    checks.attention_arrays(query, key, value)
    gates = fused.Gates(compressed_gate, selected_gate, sliding_gate)
    for name, gate in gates._asdict().items():
        if gate is not None:
            checks.gate(f"{name}_gate", gate, query)
    if all(gate is None for gate in gates):
        raise ValueError(
            "compressed_gate, selected_gate, sliding_gate: expected at least one gate, got None for all three"
        )
    block_size = checks.block_size(block_size)
    window, stride = checks.windows(
        block_size if compression_window is None else compression_window,
        block_size if compression_stride is None else compression_stride,
        block_size,
        names=("compression_window", "compression_stride"),
    )
    if (compressed_key is None) != (compressed_value is None):
        given, lacking = ("key", "value") if compressed_value is None else ("value", "key")
        raise ValueError(f"compressed_{lacking}: expected an array, as compressed_{given} is given, got None")
    num_init_blocks, num_local_blocks = checks.forced_blocks(num_init_blocks, num_local_blocks)
    block_counts = checks.block_counts(block_counts, query, key)
    if max_block_count is None:
        max_block_count = block_counts if isinstance(block_counts, int) else -(-query.shape[1] // block_size)
    config = fused.Config(
        scale=checks.scale(scale, query),
        block_size=block_size,
        window_size=checks.window_size(window_size),
        window=window,
        stride=stride,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        max_block_count=checks.max_block_count(max_block_count),
    )
    segment_ids = checks.segment_ids(segment_ids, query)
    if block_indices is not None:
        block_indices = checks.block_indices(block_indices, query, key)
    if config.window_size == 0:
        gates = gates._replace(sliding=None)
    if gates.compressed is None and (gates.selected is None or block_indices is not None):
        compressed_key = compressed_value = None
    elif compressed_key is not None:
        checks.attention_arrays(query, compressed_key, compressed_value, prefix="compressed_", stride=stride)
    arrays = fused.Arrays(query, key, value, compressed_key, compressed_value)
    routing = fused.Routing(segment_ids, block_indices, block_counts)
    return _attend(config, arrays, gates, routing, checks.resolve_implementation(implementation))


@one_program
def _attend(
    config: fused.Config, arrays: fused.Arrays, gates: fused.Gates, routing: fused.Routing, implementation: str
) -> Array:
    segment_ids = routing.segment_ids
    gates = jax.tree.map(lambda gate: segments.clear_padding(gate, segment_ids), gates)
    needs_windows = gates.compressed is not None or (gates.selected is not None and routing.block_indices is None)
    if needs_windows and arrays.compressed_key is None:
        windows = {"window": config.window, "stride": config.stride, "segment_ids": segment_ids}
        compressed_key, compressed_value = (compress(x, **windows) for x in (arrays.key, arrays.value))
        arrays = arrays._replace(compressed_key=compressed_key, compressed_value=compressed_value)
    routing = routing._replace(block_counts=jnp.asarray(routing.block_counts, jnp.int32))
    run = fused.attend if implementation == "triton" else _xla
    return segments.clear_padding(run(config, arrays, gates, routing), segment_ids)


def _xla(config: fused.Config, arrays: fused.Arrays, gates: fused.Gates, routing: fused.Routing) -> Array:
    query, key, value, compressed_key, compressed_value = arrays
    segment_ids, block_indices, block_counts = routing
    common = {"scale": config.scale, "segment_ids": segment_ids}
    outputs = fused.Gates(None, None, None)
    if compressed_key is not None:
        windows = {"window": config.window, "stride": config.stride}
        output, lse = reference.compressed_attention(query, compressed_key, compressed_value, **windows, **common)
        outputs = outputs._replace(compressed=output)
        if gates.selected is not None and block_indices is None:
            block_indices = reference.select_blocks(
                query, compressed_key, lse,
                block_counts=block_counts, max_block_count=config.max_block_count, block_size=config.block_size,
                num_init_blocks=config.num_init_blocks, num_local_blocks=config.num_local_blocks, **windows, **common,
            )  # fmt: skip
            block_counts = None
    if gates.selected is not None:
        output, _ = reference.selected_attention(
            query, key, value, block_indices, block_counts=block_counts, block_size=config.block_size, **common
        )
        outputs = outputs._replace(selected=output)
    if gates.sliding is not None:
        output, _ = reference.sliding_window_attention(query, key, value, window_size=config.window_size, **common)
        outputs = outputs._replace(sliding=output)
    return fused.gated_sum(gates, outputs, query, value)
