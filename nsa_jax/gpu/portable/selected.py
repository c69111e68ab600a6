"""Launches of kernels/selected.py and selected_keys.py, and their tiles: the selected branch on any GPU."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu import selected_keys
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.selected import Routes, Spec
from nsa_jax.gpu.walks import Choice, Walks, walks
from nsa_jax.runtime import device, launch, transforms
from nsa_jax.tiling import Tile

Array = jax.Array

# tables for G = 16, where a tile has four tokens
_BACKWARD_QUERY = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(64, 16, 4, 1))
_FORWARD = (Tile(64, 64, 4, 3), *_BACKWARD_QUERY)
_SMALL = (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
_BACKWARD_KEY_VALUE = (Tile(32, 64, 4, 5), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), *_SMALL)
_BACKWARD_KEY_VALUE_WIDE = (Tile(64, 32, 8, 2), *_SMALL)


def tokens_of(group: int) -> int:
    """Tokens that walk their blocks together in the passes of the queries."""
    return max(1, min(16, _rows(group) // group))


def _rows(group: int) -> int:
    # as many tokens as the table has at G = 16
    heads = tiling.power_of_two(group)
    return max(heads, min(128, max(16, 4 * heads)))


def query_tile(tiles, capability: int, columns: int, itemsize: int, group: int, block_size: int) -> Tile:
    """Tile of a pass of the queries, of the table `tiles`; columns: key plus value columns."""
    rows = _rows(group)
    if capability == tiling.INTERPRETER:
        return Tile(rows, min(block_size, 32), 4, 1)
    warps = min(8, rows // 16 * max(1, tiling.power_of_two(columns) // 256))
    tiles = tuple(t._replace(rows=rows, warps=warps) for t in tiles if t.keys <= block_size)
    return tiling.fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys))


def key_tile(capability: int, columns: int, itemsize: int, block_size: int) -> Tile:
    """Tile of the pass of the keys; columns: key plus value columns."""
    if capability == tiling.INTERPRETER:
        return Tile(32, min(block_size, 32), 4, 1)
    tiles = _BACKWARD_KEY_VALUE if columns <= 256 else _BACKWARD_KEY_VALUE_WIDE
    tiles = tuple(t for t in tiles if t.keys <= block_size and (itemsize == 2 or t.keys <= 32))

    def footprint(t):
        return itemsize * (columns * (t.keys + t.stages * t.rows) + 2 * t.rows * t.keys)

    return tiling.fit(tiles, capability, footprint)


def supports(query: Array, value: Array, scale: float, block_size: int, window_size: int) -> bool:
    """Whether these kernels do what is asked: they always do."""
    return True


def _sizes(query: Array, value: Array, spec: Spec) -> dict:
    """The fields that the shapes of all kernels of the selected branch have, but for the sizes of tiles."""
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    sizes = {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "PRECISION": spec.precision}
    sizes |= {"BLOCK": spec.block_size, "WINDOW": spec.window_size}
    return sizes | {"K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V)}


def _columns(sizes: dict) -> int:
    return sum(sizes["K_PARTS"]) + sum(sizes["V_PARTS"])


def walk(choice: Choice, query: Array, value: Array, spec: Spec) -> Walks:
    """What the passes of the queries walk."""
    return walks(choice, tokens_of(query.shape[2] // value.shape[2]), spec.block_size, spec.window_size)


def _walk(name, kernel, tiles, arrays, outputs, products: int, routes: Routes, spec: Spec, last=(), **constants):
    """Runs a kernel that goes from the queries' side.

    Args:
        name: of the pass, for profiles.
        kernel: of kernels/selected.py.
        tiles: the table of its tiles.
        arrays: query, key, value and what else it takes before the place.
        outputs: shapes and dtypes, of one row.
        products: multiplications per query head and key.
        routes: see `Routes`.
        spec: see `Spec`.
        last: arrays that it takes after the walks.
        **constants: that the kernel has beside SHAPE.
    """
    from nsa_jax.kernels.selected_shape import QueryShape

    query, _, value = arrays[:3]
    sizes = _sizes(query, value, spec)
    S, G, capability = routes.choice.wanted, sizes["G"], device.capability_of(kernel)
    tile = query_tile(tiles, capability, _columns(sizes), query.dtype.itemsize, G, spec.block_size)
    tokens, ahead = tokens_of(G), tiling.loads_ahead(capability)
    shape = QueryShape(**sizes, ROWS=tile.rows, KEYS=tile.keys, TOKENS=tokens, ENTRIES=tokens * S, AHEAD=ahead)

    def run(query, key, value, *arrays):
        B, T, N, _ = query.shape
        return launch.launch(
            kernel,
            query,
            *launch.key_tiles(kernel, tile.keys, key, value),
            *arrays,
            name=name,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=shape.TILES * shape.H * B,
            warps=tile.warps,
            stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * products,
            SHAPE=shape,
            **constants,
        )

    return transforms.fold_vmap(run)(*arrays, routes.choice.row.queries.place, *routes.walks, *last)


def forward(query: Array, key: Array, value: Array, routes: Routes, spec: Spec) -> list[tuple[Array, Array]]:
    """As `gpu.selected.forward`."""
    from nsa_jax.kernels import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    branch = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    placeholder = [jax.ShapeDtypeStruct((1,) * len(x.shape), x.dtype) for x in branch]
    outputs = (*branch, *(branch if spec.window_size else placeholder))
    arrays, sights = (query, key, value), (routes.sight, routes.sliding_sight)
    output, lse, *sliding = _walk(
        "selected_forward", kernels.forward, _FORWARD, arrays, outputs, K + V, routes, spec, sights
    )
    return [(output, lse), tuple(sliding)] if spec.window_size else [(output, lse)]


def backward_query(
    query: Array,
    key: Array,
    value: Array,
    d_output: Array,
    branches: list[Branch],
    routes: Routes,
    spec: Spec,
    before: Array | None = None,
) -> tuple[Array, list[Array]]:
    """As `gpu.selected.backward_query`."""
    from nsa_jax.kernels import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    delta = jax.ShapeDtypeStruct((T, N), jnp.float32)
    second = delta if spec.window_size else jax.ShapeDtypeStruct((1, 1), jnp.float32)
    lse, d_lse, weight, into = branches[0].placeholders(query, before)
    near = branches[-1]
    of_branches = branches[0].output, lse, weight, near.output, near.lse, near.weight
    d_query, *deltas = _walk(
        "selected_backward_query",
        kernels.backward_query,
        _BACKWARD_QUERY,
        (query, key, value, d_output, *of_branches, d_lse, into),
        (jax.ShapeDtypeStruct((T, N, K), query.dtype), delta, second),
        2 * K + V,
        routes,
        spec,
        HAS_D_LSE=branches[0].d_lse is not None,
        HAS_BEFORE=before is not None,
    )
    return d_query, deltas[: len(branches)]


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics], choice: Choice, spec: Spec
) -> tuple[Array, Array]:
    """As `gpu.selected.backward_key_value`, of queries in the order of their places."""
    from nsa_jax.kernels import selected_keys as kernels
    from nsa_jax.kernels.selected_shape import KeyShape

    sizes = _sizes(query, value, spec)
    capability = device.capability_of(kernels.backward_key_value)
    tile = key_tile(capability, _columns(sizes), key.dtype.itemsize, spec.block_size)

    def run(query, key, value, d_output, *arrays, sizes_of_items, **options):
        shape = KeyShape(**sizes, ROWS=tile.rows, KEYS=tile.keys, **sizes_of_items)
        return launch.launch(
            kernels.backward_key_value,
            query,
            key,
            value,
            d_output,
            *arrays,
            programs=shape.PIECES * shape.PROGRAMS * shape.H * query.shape[0],
            warps=tile.warps,
            stages=tile.stages,
            SHAPE=shape,
            **options,
        )

    return selected_keys.by_items(run, query, key, value, d_output, [rows[0], rows[-1]], choice, spec)
