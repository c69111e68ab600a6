"""Launches of kernels/interval.py, and their tiles: the compressed and the sliding branch on any GPU."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.interval import Addends, Seen, Spec
from nsa_jax.rows.intervals import Intervals
from nsa_jax.runtime import device, launch, transforms
from nsa_jax.tiling import Tile

Array = jax.Array
Tiles = tuple[Tile, ...]

_SMALLER = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
_FORWARD = (Tile(128, 64, 4, 2), *_SMALLER)
_FORWARD_WIDE = (Tile(128, 64, 8, 2), *_SMALLER[1:])
_BACKWARD_QUERY = (Tile(128, 32, 8, 3), *_SMALLER)
_BACKWARD_KEY_VALUE = (Tile(64, 128, 8, 4), Tile(64, 128, 8, 3), *_SMALLER)
_BACKWARD_KEY_VALUE_WIDE = (Tile(64, 64, 8, 2), *_SMALLER[1:])
# exact float32 products are no tensor-core products: a thread's share of a larger tile does not fit its registers
_FLOAT32 = (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1))
_INTERPRETED = Tile(64, 32, 4, 1)


def _copies(capability: int, stages: int) -> int:
    """How many of the tiles that a backward loop loads are in shared memory at once: sm_100 keeps one more."""
    return stages + (100 <= capability < 120)


def _by_width(columns: int, itemsize: int, tiles: Tiles, wide: Tiles) -> Tiles:
    if itemsize > 2:
        return _FLOAT32
    return tiles if columns <= 256 else wide  # the tuned tiles' accumulators of wider rows do not fit the registers


def forward_tile(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of `forward`; columns: key plus value columns."""
    if capability == tiling.INTERPRETER:
        return _INTERPRETED
    tiles = _by_width(columns, itemsize, _FORWARD, _FORWARD_WIDE)
    return tiling.fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys))


def backward_query_tile(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of `backward_query`; columns: key plus value columns."""
    if capability == tiling.INTERPRETER:
        return _INTERPRETED
    tiles = _by_width(columns, itemsize, _BACKWARD_QUERY, _BACKWARD_QUERY)

    def footprint(t):
        return itemsize * (columns * (t.rows + _copies(capability, t.stages) * t.keys) + t.rows * t.keys)

    return tiling.fit(tiles, capability, footprint)


def backward_key_value_tile(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of `backward_key_value`; columns: key plus value columns."""
    if capability == tiling.INTERPRETER:
        return _INTERPRETED
    tiles = _by_width(columns, itemsize, _BACKWARD_KEY_VALUE, _BACKWARD_KEY_VALUE_WIDE)

    def footprint(t):
        return itemsize * (columns * (t.keys + _copies(capability, t.stages) * t.rows) + 2 * t.rows * t.keys)

    return tiling.fit(tiles, capability, footprint)


def splits_of(programs: int, queries_per_key_tile: int, rows: int) -> int:
    """Into how many shares the queries of a key tile are cut, so that few key tiles still fill the GPU."""
    wanted = -(-1024 // max(programs, 1))
    return max(1, min(wanted, 64, queries_per_key_tile // (8 * rows)))


def supports(query: Array, value: Array, scale: float) -> bool:
    """Whether these kernels do what is asked: they always do."""
    return True


def _sizes(query: Array, value: Array, spec: Spec, choose, kernel) -> tuple[dict, Tile]:
    """The fields that the shapes of all kernels here have, and the tile that `choose` gives for `kernel`."""
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    parts = tiling.parts(K), tiling.parts(V)
    tile = choose(device.capability_of(kernel), sum(map(sum, parts)), query.dtype.itemsize)
    sizes = {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "PRECISION": spec.precision}
    return sizes | {"K_PARTS": parts[0], "V_PARTS": parts[1], "ROWS": tile.rows, "KEYS": tile.keys}, tile


def forward(
    query: Array, key: Array, value: Array, seen: Seen, spec: Spec, addends: Addends | None = None
) -> tuple[Array, Array, None]:
    """As `gpu.interval.forward`; no sum."""
    from nsa_jax.kernels import interval as kernels

    sizes, tile = _sizes(query, value, spec, forward_tile, kernels.forward)
    shape = kernels.QueryShape(**sizes)

    def run(query, key, value, *arrays):
        (B, T, N, K), V = query.shape, value.shape[3]
        return launch.launch(
            kernels.forward,
            query,
            *launch.key_tiles(kernels.forward, tile.keys, key, value),
            *arrays,
            name=f"{spec.branch}_forward",
            outputs=(jax.ShapeDtypeStruct((B, T, N, V), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=shape.TILES * shape.H * B,
            warps=tile.warps,
            stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, shape.C) * (K + V),
            SHAPE=shape,
        )

    intervals = seen.intervals
    output, lse = transforms.fold_vmap(run)(query, key, value, intervals.key_begin, intervals.key_end, seen.sight)
    return output, lse, None


def backward_query(
    query: Array,
    key: Array,
    value: Array,
    d_output: Array,
    branch: Branch,
    seen: Seen,
    spec: Spec,
    before: Array | None = None,
) -> tuple[Array, Array]:
    """As `gpu.interval.backward_query`."""
    from nsa_jax.kernels import interval as kernels

    sizes, tile = _sizes(query, value, spec, backward_query_tile, kernels.backward_query)
    shape = kernels.QueryShape(**sizes)
    has_d_lse, has_before = branch.d_lse is not None, before is not None  # `run` must hold no traced array

    def run(query, key, value, *arrays):
        (B, T, N, K), V = query.shape, value.shape[3]
        return launch.launch(
            kernels.backward_query,
            query,
            *launch.key_tiles(kernels.backward_query, tile.keys, key, value),
            *arrays,
            name=f"{spec.branch}_backward_query",
            outputs=(jax.ShapeDtypeStruct((B, T, N, K), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=shape.TILES * shape.H * B,
            warps=tile.warps,
            stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, shape.C) * (2 * K + V),
            SHAPE=shape,
            HAS_D_LSE=has_d_lse,
            HAS_BEFORE=has_before,
        )

    of_branch = branch.output, d_output, *branch.placeholders(query, before)
    intervals = seen.intervals
    d_query, delta = transforms.fold_vmap(run)(query, key, value, *of_branch, intervals.key_begin, intervals.key_end)
    return d_query, delta


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: Statistics, intervals: Intervals, spec: Spec
) -> tuple[Array, Array]:
    """(d_key [B, C, H, K], d_value [B, C, H, V]) of queries in the order of their places."""
    from nsa_jax.kernels import interval as kernels

    kernel = kernels.backward_key_value
    sizes, tile = _sizes(query, value, spec, backward_key_value_tile, kernel)
    ahead = tiling.loads_ahead(device.capability_of(kernel))

    def run(query, key, value, d_output, *arrays):
        (B, T, N, K), (_, C, H, V) = query.shape, value.shape
        query, d_output = launch.query_tiles(kernel, tile.rows, N // H, query, d_output)
        tiles = -(-C // tile.keys)
        seen_by = min(T, spec.reach + tile.keys) if spec.reach else T
        splits = splits_of(tiles * H * B, seen_by * (N // H), tile.rows)
        kind = key.dtype if splits == 1 else jnp.float32
        d_key, d_value = launch.launch(
            kernel,
            query,
            key,
            value,
            d_output,
            *arrays,
            name=f"{spec.branch}_backward_key_value",
            outputs=tuple(jax.ShapeDtypeStruct((splits, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * splits * H * B,
            warps=tile.warps,
            stages=tile.stages,
            flops=2 * B * N * spec.pairs(T, C) * (2 * K + 2 * V),
            SHAPE=kernels.KeyShape(**sizes, B=B, SPLITS=splits, AHEAD=ahead),
        )
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    of_keys = intervals.query_begin, intervals.query_end
    d_key, d_value = transforms.fold_vmap(run)(query, key, value, d_output, *rows, *of_keys)
    return d_key, d_value
