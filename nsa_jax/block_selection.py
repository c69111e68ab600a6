"""Selection: the blocks that each query attends to, by the probabilities of the compressed branch."""

import functools
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from nsa_jax import checks, meshes, reference
from nsa_jax.rows import sight
from nsa_jax.rows.queries import locate
from nsa_jax.runtime.eager import one_program

Array = jax.Array


def select_blocks(
    query: Array,
    compressed_key: Array,
    lse: Array,
    *,
    block_counts: int | Array = 16,
    block_size: int = 64,
    window: int | None = None,
    stride: int | None = None,
    max_block_count: int | None = None,
    num_init_blocks: int = 1,
    num_local_blocks: int = 2,
    scale: float | None = None,
    segment_ids: Array | None = None,
    query_indices: Array | None = None,
    key_length: int | None = None,
    implementation: Literal["triton", "xla"] | None = None,
) -> Array:
    """The blocks of its segment that each query is to attend to, one list for all heads of a group.

    The importance of a block is the compressed probability of the windows, summed over the G heads of the group, each
    window weighted by the strides it shares with the block. Always taken are, in this order where there is room for
    few, the query's own block, the num_local_blocks - 1 before it and the first num_init_blocks; then the blocks
    of most importance, of equal ones the smaller index.

    Source: Yuan et al. 2025, arXiv 2502.11089, equations 8 to 11.

    Args:
        query: [B, Tq, N, K], bfloat16, float16 or float32.
        compressed_key: [B, T // stride, H, K], of query's dtype; N is a multiple of H. See `compressed_attention`.
        lse: float32 [B, Tq, N], which `compressed_attention` returns with return_residual.
        block_counts: blocks to take, an int or integers [B, Tq, H]; from 0 to S, what is beyond is cut.
        block_size: tokens of a block, a power of two from 16 to 128.
        window: tokens in a window, a multiple of stride and at most block_size; block_size unless given.
        stride: tokens from one window to the next, a divisor of block_size; block_size unless given.
        max_block_count: S. Unless given block_counts where that is an int, else the blocks that T tokens have.
        num_init_blocks: first blocks of the segment that are always taken.
        num_local_blocks: last blocks that are always taken, the query's own included.
        scale: factor on the scores, K ** -0.5 unless given; as in `compressed_attention`.
        segment_ids: integers [B, T]; runs of equal ids are segments, negative ids are padding.
            None: every row is one segment.
        query_indices: integers [B, Tq], where in its key row each query stands, in any order; outside of it: padding.
            None: Tq is T, and query i stands at token i.
        key_length: T, the tokens of the key row, where query_indices are given and segment_ids do not tell it.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.

    Returns:
        int32 [B, Tq, H, S]: block numbers within the query's segment, ascending, then -1. No gradient flows through it.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    block_size = checks.block_size(block_size)
    window, stride = checks.windows(
        block_size if window is None else window, block_size if stride is None else stride, block_size
    )
    length = checks.key_length(key_length, query, query_indices, segment_ids)
    checks.query_and_key(query, compressed_key, length // stride, prefix="compressed_")
    checks.lse(lse, query)
    block_counts = checks.block_counts(block_counts, query, compressed_key)
    num_blocks = -(-length // block_size)
    name = "max_block_count"
    if max_block_count is None:
        max_block_count = num_blocks
        if isinstance(block_counts, int):
            max_block_count, name = block_counts, "block_counts"
    num_init_blocks, num_local_blocks = checks.forced_blocks(num_init_blocks, num_local_blocks)
    options = {
        "max_block_count": checks.integer(name, max_block_count, 0, checks.MOST_INT),  # it is a size of the result
        "block_size": block_size,
        "window": window,
        "stride": stride,
        "num_init_blocks": num_init_blocks,
        "num_local_blocks": num_local_blocks,
        "scale": checks.scale(scale, query),
    }
    select = functools.partial(_select, tuple(options.items()), length, checks.resolve_implementation(implementation))
    arrays = (
        query,
        compressed_key,
        lse,
        checks.as_int32(block_counts),
        checks.segment_ids(segment_ids, query.shape[0], length),
        checks.query_indices(query_indices, query),
    )
    return meshes.partitioned(select, arrays, lambda query, key, *_: PartitionSpec(*query[:2], key[2], None))


@one_program
def _select(options, length, implementation, query, key, lse, block_counts, segment_ids, query_indices):
    """The blocks, of checked arguments."""
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    if implementation == "xla":
        row = locate(segment_ids, query_indices, query.shape[0], length)
        return reference.select_blocks(query, key, lse, row, block_counts=block_counts, **dict(options))
    from nsa_jax.gpu import block_selection
    from nsa_jax.runtime import transforms

    query, key, lse, block_counts, segment_ids, query_indices = transforms.vary_together(
        (query, key, lse, block_counts, segment_ids, query_indices)
    )
    row = locate(segment_ids, query_indices, query.shape[0], length)
    key = sight.clean_rows(key)
    return block_selection.select(query, key, lse, row, block_counts=block_counts, **dict(options))
