"""Starts kernels/sm90/selected.py and selected_keys.py: the selected branch on Hopper GPUs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nsa_jax import launch, tiling
from nsa_jax.inverse import Items
from nsa_jax.residuals import Branch, or_placeholders
from nsa_jax.segments import Blocks
from nsa_jax.walk import PairedWalks

Array = jax.Array


def tile_for(query: Array, value: Array, block_size: int, scale: float, window_size: int) -> tiling.HopperTile | None:
    """The tile of these kernels; None where they do not do what is asked, on the device that is used."""
    if scale <= 0 or window_size:
        return None
    from nsa_jax.kernels import selected

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = launch.capability_of(selected.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return tiling.selected_hopper(capability, (K, V), query.dtype.itemsize, N // H, block_size)


def forward(
    query: Array, key: Array, value: Array, place: Array, walks: PairedWalks, sight: Array, tile: tiling.HopperTile,
    block_size: int, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """(output [B, T, N, V], lse float32 [B, T, N]), as `selected.forward` gives them."""
    from nsa_jax.kernels.sm90 import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    output, lse = _walk(
        kernels.forward, (query, key, value), outputs, K + V, place, (*walks, sight), tile, block_size, scale
    )  # fmt: skip
    return output, lse


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, place: Array, walks: PairedWalks,
    tile: tiling.HopperTile, block_size: int, scale: float, before: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_query [B, T, N, K], delta float32 [B, T, N]), as `selected.backward_query` gives them."""
    from nsa_jax.kernels.sm90 import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, K), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    lse, d_lse, weight, into = or_placeholders(branch, query, before)
    d_query, delta = _walk(
        kernels.backward_query, (query, key, value, d_output, branch.output, lse, weight, d_lse, into), outputs,
        2 * K + V, place, walks, tile, block_size, scale,
        HAS_D_LSE=branch.d_lse is not None, HAS_BEFORE=before is not None,
    )  # fmt: skip
    return d_query, delta


def does_keys(query: Array, value: Array, block_size: int, scale: float, window_size: int) -> bool:
    """Whether `backward_key_value` does what is asked."""
    is_for = tile_for(query, value, block_size, scale, window_size) is not None
    return is_for and block_size >= tiling.HOPPER_KEYS


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, lse: Array, delta: Array, weight: Array, place: Array,
    items: Items, blocks: Blocks, block_near: Array, *, outputs: Sequence[jax.ShapeDtypeStruct], programs: int,
    scale: float, block_size: int, more: int, flops: int,
) -> list[Array]:  # fmt: skip
    """d_key, d_value, d_key_more and d_value_more, as kernels/selected.py gives them; programs: of a head and row."""
    from nsa_jax.kernels.selected_shape import KeyRingShape
    from nsa_jax.kernels.sm90 import selected_keys as kernels

    (B, T, N, K), (_, C, H, V) = query.shape, value.shape
    return launch.launch(
        kernels.backward_key_value, launch.token_pieces(query, N // H), launch.key_pieces(key),
        launch.key_pieces(value), launch.token_pieces(d_output, N // H), lse, delta, weight, place,
        *items.of_kernels(), blocks.begin, blocks.end, block_near,
        outputs=outputs, programs=block_size // tiling.HOPPER_KEYS * programs * H * B, warps=4, stages=1,
        registers=tiling.HOPPER_KEYS_REGISTERS, flops=flops,
        SHAPE=KeyRingShape(
            T=T, C=C, H=H, G=N // H, K=K, V=V, SCALE=scale, BLOCK=block_size, KEYS=tiling.HOPPER_KEYS,
            BLOCKS=blocks.begin.shape[1], ITEMS=items.block.shape[2], MORE=more, PROGRAMS=programs,
            STAGES=tiling.hopper_keys_stages(K, V),
        ),
    )  # fmt: skip


def _walk(kernel, arrays, outputs, products, place, walks, tile, block_size, scale, **constants) -> list[Array]:
    """Runs a kernel on arrays that begin with query, key and value; products: multiplications per head and key."""
    from nsa_jax.kernels.selected_shape import PairedShape

    (_, T, N, K), (_, C, H, V) = arrays[0].shape, arrays[2].shape
    pairs, _, entries = walks[0].shape[2:]

    def run(query, key, value, *arrays):
        B = query.shape[0]
        units = pairs * H * B
        # of programs one fits on each multiprocessor; a pair goes through its share of the units
        programs = min(units, max(1, launch.multiprocessors() // 2))
        blocks = [launch.key_pieces(x, tile.keys) for x in (key, value)]
        return launch.launch(
            kernel, query, *blocks, *arrays,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=programs, warps=8, stages=1,
            flops=2 * B * T * N * entries // tile.tokens * block_size * products,
            SHAPE=PairedShape(
                T=T, C=C, H=H, G=N // H, K=K, V=V, SCALE=scale, BLOCK=block_size, KEYS=tile.keys, TOKENS=tile.tokens,
                ENTRIES=entries, TOGETHER=tiling.hopper_together(N // H), TILES=pairs, UNITS=units, PROGRAMS=programs,
                STAGES=tile.stages,
            ),
            **constants,
        )  # fmt: skip

    return launch.fold_vmap(run)(*arrays, place, *walks)
