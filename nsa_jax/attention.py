"""Native Sparse Attention: the compressed, selected and sliding branches, gated and added."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from nsa_jax import branches, checks, context_attention, meshes
from nsa_jax.branches import Arrays, Config, PerBranch, Routing
from nsa_jax.compression import compress
from nsa_jax.context import Sharing
from nsa_jax.reference_branches import Reference
from nsa_jax.rows.queries import locate
from nsa_jax.rows.segments import clear_padding
from nsa_jax.runtime.eager import one_program_each

Array = jax.Array


def native_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    compressed_gate: Array | float | None = None,
    selected_gate: Array | float | None = None,
    sliding_gate: Array | float | None = None,
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
    query_indices: Array | Literal["zigzag"] | None = None,
    context_axis: str | None = None,
    implementation: Literal["triton", "xla"] | None = None,
) -> Array:
    """Causal attention through three gated branches: compressed keys, selected blocks of keys, and a sliding window.

    Source: Yuan et al. 2025, arXiv 2502.11089, equations 5 to 12.

    Args:
        query: [B, Tq, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        compressed_gate, selected_gate, sliding_gate: [B, Tq, N], of a float dtype, or a number; None drops the branch.
        block_indices: integers [B, Tq, H, S], the blocks to attend to, see `selected_attention`; None selects them by
            the compressed probabilities, see `select_blocks`.
        block_counts: blocks per query, an int or integers [B, Tq, H]. Of given block_indices the first block_counts
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
            cut. Unless given the number of blocks in T tokens: give it where T is large, since memory grows with it.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; everything is relative to a run of equal ids, negative ids are padding. May change
            at every call without a new compilation. None: every row is one segment.
        query_indices: integers [B, Tq], where in its key row each query stands: it sees what the token there would see.
            Any order, repeats allowed; fast where neighbouring queries stand side by side. Outside of 0 .. T - 1: the
            query is padding. None: Tq is T, and query i stands at token i.
        context_axis: a mesh axis of the enclosing `jax.shard_map` whose devices share the tokens of every row; T counts
            those of all of them. query, key, value, gates, segment_ids, block_indices and block_counts are of the
            Tq = T / devices tokens that this device holds, compressed keys and values those of the whole row. Each
            token stands where query_indices say, each place at most once; None: device i holds the i-th of as many
            equal runs; "zigzag": those of `zigzag_indices`, faster than the same indices as an array. The result and
            the gradients are those of the whole row.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.

    Returns:
        [B, Tq, N, V] in query's dtype: the sum of gate * output over the three branches.
        A query at padding gets 0. One that sees a value that is not finite gets NaN, and no other does.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype, or no gate is given.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    shares = checks.context_axis(context_axis)
    one_each = None if shares else query_indices  # a query for each token of a share
    checks.attention_arrays(query, key, value, checks.query_length(query, one_each))
    length = key.shape[1] * (shares or 1)
    gates = checked_gates(query, compressed_gate, selected_gate, sliding_gate)
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
    num_blocks = -(-length // block_size)
    if max_block_count is None:
        max_block_count = block_counts if isinstance(block_counts, int) else num_blocks
    config = Config(
        scale=checks.scale(scale, query),
        block_size=block_size,
        window_size=checks.window_size(window_size),
        window=window,
        stride=stride,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        max_block_count=min(checks.max_block_count(max_block_count), num_blocks),
        selects_all=block_indices is None and isinstance(block_counts, int) and block_counts >= num_blocks,
    )
    segment_ids = checks.segment_ids(segment_ids, *key.shape[:2])
    query_indices = checks.query_indices(query_indices, query, shares)
    if block_indices is not None:
        block_indices = checks.block_indices(block_indices, query, key)
    if compressed_key is not None:
        checks.attention_arrays(query, compressed_key, compressed_value, length // stride, prefix="compressed_")
    if config.window_size == 0:
        gates = gates._replace(sliding=None)
    if not branches.needs_windows(config, gates, block_indices):
        compressed_key = compressed_value = None

    arrays = Arrays(query, key, value, compressed_key, compressed_value)
    sharing = None
    if context_axis is not None:
        sharing = Sharing.of(context_axis, query_indices)
        query_indices = query_indices if sharing.order == "any" else None
    routing = Routing(segment_ids, query_indices, block_indices, checks.as_int32(block_counts))
    leaves, tree = jax.tree.flatten((arrays, gates, routing))
    attend = functools.partial(_attend, config, checks.resolve_implementation(implementation), sharing, tree)
    return meshes.partitioned(attend, tuple(leaves), lambda *axes: meshes.attention_specs(*axes)[0])


def checked_gates(query: Array, compressed: Array | float | None, selected, sliding) -> PerBranch:
    """The gates that are given, of which there must be one."""
    gates = PerBranch(compressed, selected, sliding)
    if all(gate is None for gate in gates):
        raise ValueError(
            "compressed_gate, selected_gate, sliding_gate: expected at least one gate, got None for all three"
        )
    named = zip(PerBranch._fields, gates, strict=True)
    return PerBranch(*(None if gate is None else checks.gate(f"{name}_gate", gate, query) for name, gate in named))


@one_program_each
def _attend(config: Config, implementation: str, sharing: Sharing | None, tree, *leaves: Array) -> Array:
    """`native_sparse_attention` of checked arguments: the leaves of Arrays, PerBranch of gates, and Routing."""
    arrays, gates, routing = jax.tree.unflatten(tree, leaves)
    gates = jax.tree.map(lambda gate: jnp.broadcast_to(gate, arrays.query.shape[:3]), gates)
    if sharing is not None:
        op = functools.partial(_attend_rows, implementation)
        return context_attention.attend(op, sharing, config, arrays, gates, routing)
    return _attend_rows(implementation, config, arrays, gates, routing)


def _attend_rows(implementation: str, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    """`native_sparse_attention` of checked arguments: keys and values of whole rows, gates [B, Tq, N]."""
    places = routing.segment_ids, routing.query_indices
    row = locate(*places, *arrays.key.shape[:2], ascending=config.ascending)
    if row.packed or row.sliced:
        gates = jax.tree.map(lambda gate: clear_padding(gate, row.queries.valid), gates)
    if branches.needs_windows(config, gates, routing.block_indices) and arrays.compressed_key is None:
        windows = {"window": config.window, "stride": config.stride, "segment_ids": routing.segment_ids}
        compressed_key, compressed_value = (compress(x, **windows) for x in (arrays.key, arrays.value))
        arrays = arrays._replace(compressed_key=compressed_key, compressed_value=compressed_value)
    if implementation == "triton":
        from nsa_jax.gpu import whole

        return whole.attend(config, arrays, gates, routing)
    outputs, _ = branches.run(Reference(config, arrays, routing.block_counts, row), config, arrays, gates, routing)
    return branches.gated_sum(gates, outputs, arrays.query, arrays.value)
