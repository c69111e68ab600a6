"""Launch of kernels/select_blocks.py, and its tiles: selection on any GPU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.runtime import device, launch
from nsa_jax.tiling import Tile

Array = jax.Array

_TILES = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1))
_BLOCKS = 256  # blocks of a chunk
_OVERLAPPING = (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), *_TILES)  # used where a block has several strides
_OVERLAPPING_BLOCKS = 64
_SCRATCH = 16 * 1024  # bytes that layout changes take


class SelectionTile(NamedTuple):
    """tokens, heads: a side; keys: the other; parts: key tiles in a chunk; warps, stages: of the launch."""

    tokens: int
    heads: int
    keys: int
    parts: int
    warps: int
    stages: int


def select_tile(
    capability: int, columns: int, itemsize: int, group: int, entries: int, block_strides: int
) -> SelectionTile:
    """Tile of `select`; columns: of keys, entries: of a token's list."""
    heads = tiling.power_of_two(group)
    if capability == tiling.INTERPRETER:
        tile, blocks = Tile(64, 32, 4, 1), 32
    else:
        tiles, blocks = (_TILES, _BLOCKS) if block_strides == 1 else (_OVERLAPPING, _OVERLAPPING_BLOCKS)
        tiles = tiles if itemsize == 2 else _TILES[2:]
        tile = tiling.fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys) + _SCRATCH)
    tokens = max(1, min(16, tile.rows // heads, 4096 // entries))
    keys = max(tile.keys, block_strides)
    parts = max(1, blocks * block_strides // keys)
    return SelectionTile(tokens, max(heads, 16 // tokens), keys, parts, tile.warps, tile.stages)


def supports(query: Array, key: Array, count: int, block_strides: int) -> bool:
    """Whether this kernel does what is asked: it always does."""
    return True


def select(query: Array, key: Array, *arrays: Array, sizes: dict, flops: int) -> Array:
    """As `gpu.block_selection.select`: int32 [B, Tq, H, S]. arrays: of the kernel; sizes: of its `SelectionShape`."""
    from nsa_jax.kernels import select_blocks as kernels

    (B, T, _, K), H = query.shape, key.shape[2]
    parts = tiling.parts(K)
    tile = select_tile(
        device.capability_of(kernels.select),
        sum(parts),
        query.dtype.itemsize,
        sizes["G"],
        sizes["LIST"],
        sizes["BLOCK_STRIDES"],
    )
    shape = kernels.SelectionTileShape(
        **sizes,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        ROWS=tile.tokens * tile.heads,
        KEYS=tile.keys,
        PARTS=tile.parts,
        K_PARTS=parts,
        PRECISION=device.dot_precision(),
    )
    (block_indices,) = launch.launch(
        kernels.select,
        query,
        *launch.key_tiles(kernels.select, tile.keys, key),
        *arrays,
        name="select_blocks",
        outputs=(jax.ShapeDtypeStruct((B, T, H, shape.S), jnp.int32),),
        programs=H * shape.TILES * B if shape.S else 0,
        warps=tile.warps,
        stages=tile.stages,
        flops=flops,
        SHAPE=shape,
    )
    return block_indices
