"""Launch of kernels/sm90/select_blocks.py: selection on Hopper."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.runtime import device, launch

Array = jax.Array


def supports(query: Array, key: Array, count: int, windows_per_block: int) -> bool:
    """Whether this kernel does what is asked, on the device that is used."""
    from nsa_jax.kernels import select_blocks

    (_, _, N, K), H = query.shape, key.shape[2]
    capability = device.capability_of(select_blocks.select)  # 0 in Triton's interpreter, which does not know Gluon
    return tiling.selection_hopper(capability, K, query.dtype.itemsize, N // H, count, windows_per_block)


def select(query: Array, key: Array, *arrays: Array, flops: int, S: int, **constants) -> Array:
    """block_indices int32 [B, Tq, H, S]; arrays and constants are those of the kernel."""
    from nsa_jax.kernels.sm90 import select_blocks as kernels

    (B, T, N, K), H = query.shape, key.shape[2]
    G = N // H
    tiles = -(-T * G // tiling.SELECTION_HOPPER_ROWS)
    programs = min(tiles * H * B, device.multiprocessors())  # one fits on each
    queries = launch.neighbour_pieces(query, G, *kernels.neighbours(G))
    (block_indices,) = launch.launch(
        kernels.select, queries, launch.key_pieces(key), *arrays, name="select_blocks",
        outputs=(jax.ShapeDtypeStruct((B, T, H, S), jnp.int32),),
        programs=programs if S else 0, warps=4, stages=1, flops=flops,
        T=T, H=H, G=G, K=K, B=B, S=S, LIST=tiling.selection_entries(S), TILES=tiles, PROGRAMS=programs,
        STAGES=tiling.selection_hopper_stages(K, G), **constants,
    )  # fmt: skip
    return block_indices
