"""Launch of kernels/select_blocks.py: selection on any GPU."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.runtime import device, launch

Array = jax.Array


def supports(query: Array, key: Array, count: int, windows_per_block: int) -> bool:
    """Whether this kernel does what is asked: it always does."""
    return True


def select(query: Array, key: Array, *arrays: Array, flops: int, S: int, BLOCK_STRIDES: int, **constants) -> Array:
    """block_indices int32 [B, Tq, H, S]; arrays and constants are those of the kernel."""
    from nsa_jax.kernels import select_blocks as kernels

    (B, T, N, K), (_, C, H, _) = query.shape, key.shape
    capability = device.capability_of(kernels.select)
    tile = tiling.selection(capability, sum(tiling.parts(K)), query.dtype.itemsize, N // H, S, BLOCK_STRIDES)
    tiles = -(-T // tile.tokens)
    (block_indices,) = launch.launch(
        kernels.select, query, *launch.key_tiles(kernels.select, tile.keys, key), *arrays, name="select_blocks",
        outputs=(jax.ShapeDtypeStruct((B, T, H, S), jnp.int32),),
        programs=H * tiles * B if S else 0, warps=tile.warps, stages=tile.stages, flops=flops,
        T=T, C=C, H=H, G=N // H, K=K, TOKENS=tile.tokens, HEADS=tile.heads, KEYS=tile.keys, PARTS=tile.parts,
        LIST=tile.entries, TILES=tiles, K_PARTS=tiling.parts(K), PRECISION=device.dot_precision(), S=S,
        BLOCK_STRIDES=BLOCK_STRIDES,
        **constants,
    )  # fmt: skip
    return block_indices
