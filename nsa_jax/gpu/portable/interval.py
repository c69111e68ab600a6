"""Launches of kernels/interval.py: the compressed and the sliding branch on any GPU."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.interval import Addends, Seen, Spec
from nsa_jax.rows.intervals import Intervals
from nsa_jax.runtime import device, launch, transforms

Array = jax.Array


def supports(query: Array, value: Array, scale: float) -> bool:
    """Whether these kernels do what is asked: they always do."""
    return True


def _shape(query: Array, key: Array, value: Array, spec: Spec) -> dict:
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {
        "T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "PRECISION": spec.precision,
        "K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V),
    }  # fmt: skip


def _pick(choose, kernel, shape: dict, dtype) -> tiling.Tile:
    capability = device.capability_of(kernel)
    return choose(capability, sum(shape["K_PARTS"]) + sum(shape["V_PARTS"]), dtype.itemsize)


def forward(
    query: Array, key: Array, value: Array, seen: Seen, spec: Spec, addends: Addends | None = None
) -> tuple[Array, Array, None]:
    """As `gpu.interval.forward`; no sum."""
    from nsa_jax.kernels import interval as kernels

    shape = _shape(query, key, value, spec)
    tile = _pick(tiling.interval_forward, kernels.forward, shape, query.dtype)

    def run(query, key, value, *arrays):
        B, T, N, K = query.shape
        C, H, V = value.shape[1:]
        tiles = -(-T * (N // H) // tile.rows)
        return launch.launch(
            kernels.forward, query, *launch.key_tiles(kernels.forward, tile.keys, key, value), *arrays,
            name=f"{spec.branch}_forward",
            outputs=(jax.ShapeDtypeStruct((B, T, N, V), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, C) * (K + V),
            ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, **shape,
        )  # fmt: skip

    intervals = seen.intervals
    output, lse = transforms.fold_vmap(run)(query, key, value, intervals.key_begin, intervals.key_end, seen.sight)
    return output, lse, None


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, seen: Seen, spec: Spec,
    before: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """As `gpu.interval.backward_query`."""
    from nsa_jax.kernels import interval as kernels

    shape = _shape(query, key, value, spec)
    tile = _pick(tiling.interval_backward_query, kernels.backward_query, shape, query.dtype)

    has_d_lse, has_before = branch.d_lse is not None, before is not None  # `run` must hold no traced array

    def run(query, key, value, *arrays):
        B, T, N, K = query.shape
        C, H, V = value.shape[1:]
        tiles = -(-T * (N // H) // tile.rows)
        return launch.launch(
            kernels.backward_query, query, *launch.key_tiles(kernels.backward_query, tile.keys, key, value), *arrays,
            name=f"{spec.branch}_backward_query",
            outputs=(jax.ShapeDtypeStruct((B, T, N, K), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, C) * (2 * K + V),
            ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, HAS_D_LSE=has_d_lse,
            HAS_BEFORE=has_before, **shape,
        )  # fmt: skip

    d_query, delta = transforms.fold_vmap(run)(
        query, key, value, branch.output, d_output, *branch.placeholders(query, before),
        seen.intervals.key_begin, seen.intervals.key_end,
    )  # fmt: skip
    return d_query, delta


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: Statistics, intervals: Intervals, spec: Spec
) -> tuple[Array, Array]:
    """(d_key [B, C, H, K], d_value [B, C, H, V]) of queries in the order of their places."""
    from nsa_jax.kernels import interval as kernels

    shape = _shape(query, key, value, spec)
    ahead = tiling.selected_ahead(device.capability_of(kernels.backward_key_value))
    tile = _pick(tiling.interval_backward_key_value, kernels.backward_key_value, shape, query.dtype)

    def run(query, key, value, d_output, *arrays):
        B, T, N, K = query.shape
        C, H, V = value.shape[1:]
        query, d_output = launch.query_tiles(kernels.backward_key_value, tile.rows, N // H, query, d_output)
        tiles = -(-C // tile.keys)
        seen_by = min(T, spec.reach + tile.keys) if spec.reach else T
        splits = tiling.interval_splits(tiles * H * B, seen_by * (N // H), tile.rows)
        kind = key.dtype if splits == 1 else jnp.float32
        d_key, d_value = launch.launch(
            kernels.backward_key_value, query, key, value, d_output, *arrays,
            name=f"{spec.branch}_backward_key_value",
            outputs=tuple(jax.ShapeDtypeStruct((splits, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * splits * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, C) * (2 * K + 2 * V),
            B=B, ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, SPLITS=splits, AHEAD=ahead, **shape,
        )  # fmt: skip
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    d_key, d_value = transforms.fold_vmap(run)(
        query, key, value, d_output, *rows, intervals.query_begin, intervals.query_end
    )
    return d_key, d_value
