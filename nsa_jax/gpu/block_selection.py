"""Selection of blocks by the kernels."""

import math

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu import backends
from nsa_jax.rows.intervals import window_intervals
from nsa_jax.rows.queries import Row
from nsa_jax.runtime import transforms
from nsa_jax.runtime.partitioning import KEY, OF_QUERIES, QUERY, ROWS, SIGHT, partitioned

Array = jax.Array


def list_entries(count: int) -> int:
    """Entries in a token's list, of which it uses at most `count`."""
    return max(32, tiling.power_of_two(max(count, 1)))


def sizes_of(query: Array, key: Array, **options) -> dict:
    """The fields of the kernels' `SelectionShape`; options: those that the arrays do not tell."""
    (_, T, N, K), (_, C, H, _) = query.shape, key.shape
    return {"T": T, "C": C, "H": H, "G": N // H, "K": K, "LIST": list_entries(options["S"]), **options}


def select(
    query: Array,
    compressed_key: Array,
    lse: Array,
    row: Row,
    *,
    block_counts: int | Array,
    max_block_count: int,
    block_size: int,
    window: int,
    stride: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Array:
    """The arguments and the result are those of `reference.select_blocks`; compressed keys come cleaned."""
    (B, Tq, _, K), H = query.shape, compressed_key.shape[2]
    num_blocks = -(-row.length // block_size)
    S = min(max_block_count, num_blocks)
    queries, seen = row.queries, window_intervals(row, window, stride)
    counts = jnp.broadcast_to(jnp.asarray(block_counts, jnp.int32), (B, Tq, H))
    counts = jnp.where(queries.valid[..., None], jnp.clip(counts, 0, S), 0)
    if compressed_key.shape[1] == 0:
        compressed_key = jnp.zeros((B, 1, H, K), compressed_key.dtype)  # a kernel can be given it; nobody sees it
    backend = backends.block_selection(query, compressed_key, S, block_size // stride)

    options = {
        "S": S,
        "SCALE": scale,
        "BLOCK_STRIDES": block_size // stride,
        "WINDOW_STRIDES": window // stride,
        "INIT": min(num_init_blocks, num_blocks),
        "LOCAL": min(num_local_blocks, num_blocks),
    }

    def run(query, key, *arrays):
        sizes = sizes_of(query, key, **options)
        return backend.select(query, key, *arrays, sizes=sizes, flops=math.prod(query.shape) * key.shape[1])

    places = queries.start, queries.position // block_size, seen.key_begin, seen.key_end
    arrays = query, compressed_key, lse, counts, *places
    axes = QUERY, KEY, OF_QUERIES, SIGHT, *[ROWS] * len(places)
    block_indices = partitioned(transforms.fold_vmap(run), arrays, axes, SIGHT)
    return jnp.pad(block_indices, ((0, 0),) * 3 + ((0, max_block_count - S),), constant_values=-1)
