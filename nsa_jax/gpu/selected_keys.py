"""The selected branch's pass of keys and values, for every backend: through items of the inverse selection."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Statistics
from nsa_jax.gpu.inverse import Items, invert, more_items
from nsa_jax.gpu.selected import Spec
from nsa_jax.gpu.walks import Choice, Walks, walks
from nsa_jax.rows.blocks import Blocks, blocks
from nsa_jax.runtime import device, launch, transforms

Array = jax.Array

_COMBINED_KEYS = 16  # keys of a tile of the kernel that adds up a block's items


def chunk(capability: int) -> int:
    """Tokens that one item holds: small enough that a block that all tokens choose is shared among many programs, large
    enough that the partial sums stay a fraction of the inputs."""
    return 16 if capability == tiling.INTERPRETER else 1024


def stretch(capability: int) -> int:
    """Tokens in a stretch of the row, by which the items are ordered: few enough that what programs read together is
    often in the L2 still, enough that the partial sums stay a fraction of the inputs."""
    return 48 if capability == tiling.INTERPRETER else 16384


def by_items(
    run, query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics], choice: Choice, spec: Spec
) -> tuple[Array, Array]:
    """(d_key, d_value) by a kernel that goes through the items of the inverse selection.

    Args:
        run: starts the kernel: (query, key, value, d_output, *arrays, sizes_of_items, name, outputs, flops) -> (d_key,
            d_value, d_key_more, d_value_more), see kernels/selected_keys.py. The arrays are what it takes next: the
            statistics, the place, items and blocks. sizes_of_items are the fields of its `ItemsShape`.
        query, d_output, rows: in the order of the queries' places.
        key, value: cleaned.
        choice: of the queries in the order of their places.
        spec: see `Spec`.
    """
    from nsa_jax.kernels import selected_keys as kernels

    T, S, row = query.shape[1], choice.wanted, choice.row
    capability = device.capability_of(kernels.combine)
    size = chunk(capability), stretch(capability)
    more = more_items(T, row.length, S, spec.block_size, *size, row.sliced)
    kind = jnp.float32 if more else key.dtype  # float32 where several items are added
    statistics = [x for row in rows for x in row]
    of_query, of_walks = len(statistics) + 1, len(Walks._fields)

    def of_rows(query, key, value, d_output, *arrays):
        (B, _, N, K), (_, C, H, V) = query.shape, value.shape
        in_blocks = Blocks(*arrays[of_query + of_walks :])
        items = invert(Walks(*arrays[of_query : of_query + of_walks]), in_blocks, *size, more)
        of_items = *items.of_kernels(), in_blocks.begin, in_blocks.end, in_blocks.near
        d_key, d_value, d_key_more, d_value_more = run(
            query,
            key,
            value,
            d_output,
            *arrays[:of_query],
            *of_items,
            sizes_of_items={
                "BLOCKS": in_blocks.begin.shape[1],
                "ITEMS": items.block.shape[2],
                "MORE": max(more, 1),
                "PROGRAMS": -(-C // spec.block_size) + more,
            },
            name="selected_backward_key_value",
            outputs=(
                *(jax.ShapeDtypeStruct((B, C, H, width), kind) for width in (K, V)),
                *(jax.ShapeDtypeStruct((B, H, max(more, 1), spec.block_size, width), jnp.float32) for width in (K, V)),
            ),
            flops=2 * B * T * N * S * spec.block_size * (2 * K + 2 * V),
        )
        if not more:
            return d_key, d_value
        return [
            _combine(first, rest, items, in_blocks, key.dtype)
            for first, rest in ((d_key, d_key_more), (d_value, d_value_more))
        ]

    singles = walks(choice, 1, spec.block_size, spec.window_size)
    in_blocks = blocks(row, spec.block_size, spec.window_size)
    d_key, d_value = transforms.fold_vmap(of_rows)(
        query, key, value, d_output, *statistics, row.queries.place, *singles, *in_blocks
    )
    return d_key, d_value


def _combine(first: Array, rest: Array, items: Items, blocks: Blocks, dtype) -> Array:
    """first [B, C, H, D] plus the further items of each block, in rest [B, H, MORE, block_size, D], as `dtype`."""
    from nsa_jax.kernels import selected_keys as kernels

    B, C, H, D = first.shape
    more, block_size = rest.shape[2:4]
    shape = kernels.CombineShape(
        C=C,
        H=H,
        D=D,
        PARTS=tiling.parts(D),
        BLOCK=block_size,
        KEYS=_COMBINED_KEYS,
        BLOCKS=blocks.begin.shape[1],
        MORE=more,
    )
    (total,) = launch.launch(
        kernels.combine,
        first,
        rest,
        items.further,
        blocks.begin,
        blocks.end,
        blocks.count,
        name="selected_combine",
        outputs=(jax.ShapeDtypeStruct(first.shape, dtype),),
        programs=shape.PIECES * shape.PROGRAMS * H * B,
        warps=4,
        stages=2,
        flops=rest.size,
        SHAPE=shape,
    )
    return total
