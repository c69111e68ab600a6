"""Starts kernels/selected_hopper.py: the selected branch's passes from the query's side on Hopper GPUs."""

import jax
import jax.numpy as jnp

from nsa_jax import launch, tiling
from nsa_jax.residuals import Branch, or_placeholders
from nsa_jax.walk import Walks

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
    query: Array, key: Array, value: Array, place: Array, walks: Walks, tile: tiling.HopperTile, block_size: int,
    scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """(output [B, T, N, V], lse float32 [B, T, N]), as `selected.forward` gives them."""
    from nsa_jax.kernels import selected_hopper as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    output, lse = _walk(
        kernels.forward, (query, key, value), outputs, K + V, place, walks, tile, block_size, scale
    )  # fmt: skip
    return output, lse


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, place: Array, walks: Walks,
    tile: tiling.HopperTile, block_size: int, scale: float, before: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_query [B, T, N, K], delta float32 [B, T, N]), as `selected.backward_query` gives them."""
    from nsa_jax.kernels import selected_hopper as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, K), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    lse, d_lse, weight, into = or_placeholders(branch, query, before)
    d_query, delta = _walk(
        kernels.backward_query, (query, key, value, d_output, branch.output, lse, weight, d_lse, into), outputs,
        2 * K + V, place, walks, tile, block_size, scale,
        HAS_D_LSE=branch.d_lse is not None, HAS_BEFORE=before is not None,
    )  # fmt: skip
    return d_query, delta


def _walk(kernel, arrays, outputs, products, place, walks, tile, block_size, scale, **constants) -> list[Array]:
    """Runs a kernel on arrays that begin with query, key and value; products: multiplications per head and key."""
    (_, T, N, K), (_, C, H, V) = arrays[0].shape, arrays[2].shape
    tiles, entries = walks.begins.shape[2:]

    def run(query, key, value, *arrays):
        B = query.shape[0]
        units = tiles * H * B
        programs = min(units, launch.multiprocessors())  # one fits on each, and goes through its share of the units
        blocks = [launch.Tiled(x.reshape(B, C, -1), (1, tile.keys, x.shape[3]), swizzled=True) for x in (key, value)]
        return launch.launch(
            kernel, query, *blocks, *arrays,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=programs, warps=8, stages=1,
            flops=2 * B * T * N * entries // tile.tokens * block_size * products,
            T=T, C=C, H=H, G=N // H, K=K, V=V, SCALE=scale, TOKENS=tile.tokens, WALK=entries, KEYS=tile.keys,
            SHARES=block_size // tile.keys, TOGETHER=tiling.hopper_together(N // H), TILES=tiles, UNITS=units,
            PROGRAMS=programs, STAGES=tile.stages, **constants,
        )  # fmt: skip

    return launch.fold_vmap(run)(*arrays, place, *walks)
