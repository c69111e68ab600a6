"""Selection: the blocks that each query attends to, by the probabilities of the compressed branch."""

import jax
import jax.numpy as jnp

from nsa_jax import checks, launch, reference, segments, selection_hopper, tiling

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
    implementation: str | None = None,
) -> Array:
    """The blocks of its segment that each query is to attend to, one list for all heads of a group.

    The importance of a block is the compressed probability of the windows, summed over the G heads of the group, each
    window weighted by the strides it shares with the block. Always taken are, in this order where there is room for
    few, the query's own block, the num_local_blocks - 1 before it and the first num_init_blocks; then the blocks
    of most importance, of equal ones the smaller index.

    Source: Yuan et al. 2025, arXiv 2502.11089, equations 8 to 11.

    Args:
        query: [B, T, N, K], bfloat16, float16 or float32.
        compressed_key: [B, T // stride, H, K], of query's dtype; N is a multiple of H. See `compressed_attention`.
        lse: float32 [B, T, N], which `compressed_attention` returns with return_residual.
        block_counts: blocks to take, an int or integers [B, T, H]; from 0 to S, what is beyond is cut.
        block_size: tokens of a block, a power of two from 16 to 128.
        window: tokens in a window, a multiple of stride and at most block_size; block_size unless given.
        stride: tokens from one window to the next, a divisor of block_size; block_size unless given.
        max_block_count: S. Unless given block_counts where that is an int, else the blocks that T tokens have.
        num_init_blocks: first blocks of the segment that are always taken.
        num_local_blocks: last blocks that are always taken, the query's own included.
        scale: factor on the scores, K ** -0.5 unless given; as in `compressed_attention`.
        segment_ids: integers [B, T]; runs of equal ids are segments, negative ids are padding.
            None: every row is one segment.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.

    Returns:
        int32 [B, T, H, S]: block numbers within the query's segment, ascending, then -1. No gradient flows through it.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    block_size = checks.block_size(block_size)
    window, stride = checks.windows(
        block_size if window is None else window, block_size if stride is None else stride, block_size
    )
    checks.attention_arrays(query, compressed_key, None, prefix="compressed_", stride=stride)
    checks.lse(lse, query)
    block_counts = checks.block_counts(block_counts, query, compressed_key)
    num_blocks = -(-query.shape[1] // block_size)
    if max_block_count is None:
        max_block_count = block_counts if isinstance(block_counts, int) else num_blocks
    num_init_blocks, num_local_blocks = checks.forced_blocks(num_init_blocks, num_local_blocks)
    run = _triton if checks.resolve_implementation(implementation) == "triton" else reference.select_blocks
    return run(
        *jax.lax.stop_gradient((query, compressed_key, lse)),
        block_counts=block_counts,
        max_block_count=checks.max_block_count(max_block_count),
        block_size=block_size,
        window=window,
        stride=stride,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        scale=checks.scale(scale, query),
        segment_ids=checks.segment_ids(segment_ids, query),
    )


def _triton(
    query, key, lse, *,
    block_counts, max_block_count, block_size, window, stride, num_init_blocks, num_local_blocks, scale, segment_ids,
):  # fmt: skip
    from nsa_jax.kernels import select_blocks as kernels

    B, T, N, K = query.shape
    H = key.shape[2]
    num_blocks = -(-T // block_size)
    S = min(max_block_count, num_blocks)
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), (B, T, H))
    query, key, lse, counts, segment_ids = launch.vary_together((query, key, lse, counts, segment_ids))
    tokens = segments.layout(segment_ids, B, T)
    seen = segments.window_intervals(tokens, window, stride)
    counts = jnp.where(tokens.valid[..., None], jnp.clip(counts, 0, S), 0)
    if key.shape[1] == 0:
        key = jnp.zeros((B, 1, H, K), key.dtype)  # an array the kernel can be given; nobody sees it

    share, capability = block_size // stride, launch.capability_of(kernels.select)
    tile = tiling.selection(capability, sum(tiling.parts(K)), query.dtype.itemsize, N // H, S, share)
    constants = {
        "S": S, "SCALE": scale, "BLOCK_STRIDES": share, "WINDOW_STRIDES": window // stride,
        "INIT": min(num_init_blocks, num_blocks), "LOCAL": min(num_local_blocks, num_blocks),
    }  # fmt: skip

    def run(query, key, *arrays):
        B, C = key.shape[:2]
        flops = B * N * T * (T // stride) * K
        if selection_hopper.fits(query, key, S, share):
            return selection_hopper.select(query, key, *arrays, flops=flops, **constants)
        tiles = -(-T // tile.tokens)
        (block_indices,) = launch.launch(
            kernels.select, query, *launch.key_tiles(kernels.select, tile.keys, key), *arrays,
            outputs=(jax.ShapeDtypeStruct((B, T, H, S), jnp.int32),),
            programs=H * tiles * B if S else 0, warps=tile.warps, stages=tile.stages, flops=flops,
            T=T, C=C, H=H, G=N // H, K=K, TOKENS=tile.tokens, HEADS=tile.heads, KEYS=tile.keys, PARTS=tile.parts,
            LIST=tile.entries, TILES=tiles, K_PARTS=tiling.parts(K), PRECISION=launch.dot_precision(), **constants,
        )  # fmt: skip
        return block_indices

    block_indices = launch.fold_vmap(run)(
        query, key, lse, counts, tokens.start, tokens.position // block_size, seen.key_begin, seen.key_end
    )
    return jnp.pad(block_indices, ((0, 0),) * 3 + ((0, max_block_count - S),), constant_values=-1)
