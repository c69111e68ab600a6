"""Launch of kernels/sm90/select_blocks.py, and when it is used: selection on Hopper."""

import jax
import jax.numpy as jnp

from nsa_jax.gpu.sm90 import ring
from nsa_jax.runtime import device, launch

Array = jax.Array


def supports(query: Array, key: Array, count: int, block_strides: int) -> bool:
    """Whether this kernel does what is asked, on the device that is used."""
    from nsa_jax.kernels import select_blocks

    (_, _, N, K), H = query.shape, key.shape[2]
    capability = device.capability_of(select_blocks.select)  # 0 in Triton's interpreter, which does not know Gluon
    return is_for(capability, K, query.dtype.itemsize, N // H, count, block_strides)


def is_for(capability: int, width: int, itemsize: int, group: int, count: int, block_strides: int) -> bool:
    """Whether this kernel is for an architecture and keys of that width, of which `count` blocks are selected."""
    fits = width in (64, 128) and group in (8, 16, 32, 64) and count <= 64 and block_strides in (1, 2, 4, 8)
    return capability == 90 and itemsize == 2 and fits


def stages(width: int, group: int) -> int:
    """Slots of the ring, beside the queries of two units and two chunks of sums."""
    from nsa_jax.kernels.sm90.window_sums import CHUNKS, KEYS, UNIT, WINDOWS

    queries = 2 * UNIT.value * (2 * width + 4)  # each with a float32 lse
    sums = 4 * CHUNKS.value * UNIT.value // group * WINDOWS.value
    return ring.stages(2 * KEYS.value * width, beside=queries + sums)


def select(query: Array, key: Array, *arrays: Array, sizes: dict, flops: int) -> Array:
    """As `gpu.block_selection.select`: int32 [B, Tq, H, S]. arrays: of the kernel; sizes: of its `SelectionShape`."""
    from nsa_jax.kernels.sm90 import select_blocks as kernels

    (B, T, _, K), G = query.shape, sizes["G"]
    multiprocessors = device.multiprocessors()
    shape = kernels.SelectionUnitShape(**sizes, B=B, MULTIPROCESSORS=multiprocessors, STAGES=stages(K, G))
    (block_indices,) = launch.launch(
        kernels.select,
        launch.neighbour_pieces(query, G, *kernels.neighbours(G)),
        launch.key_pieces(key),
        *arrays,
        name="select_blocks",
        outputs=(jax.ShapeDtypeStruct((B, T, shape.H, shape.S), jnp.int32),),
        programs=shape.PROGRAMS if shape.S else 0,
        warps=4,
        stages=1,
        flops=flops,
        SHAPE=shape,
    )
    return block_indices
