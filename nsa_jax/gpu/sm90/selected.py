"""Launches of kernels/sm90/selected.py and selected_keys.py, and when they are used: the selected branch on Hopper."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.gpu import selected_keys
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.portable import selected as portable
from nsa_jax.gpu.selected import Routes, Spec
from nsa_jax.gpu.sm90 import key_pass, ring
from nsa_jax.gpu.walks import Choice, PairedWalks, walks_in_pairs
from nsa_jax.runtime import device, launch, transforms

Array = jax.Array

_ROWS = 128  # query rows of a unit


class UnitTile(NamedTuple):
    """tokens: of a unit; keys: of a slot of the ring, of which there are `stages`."""

    tokens: int
    keys: int
    stages: int


def tile_of(capability: int, widths: Sequence[int], itemsize: int, group: int, block_size: int) -> UnitTile | None:
    """Tile of the passes of the queries; None where they are not for this architecture or shape.

    Args:
        capability: of the architecture.
        widths: of keys and of values.
        itemsize: bytes of an element.
        group: query heads of a kv head.
        block_size: keys of a block.
    """
    fits = all(width in (64, 128) for width in widths) and group in (8, 16, 32, 64, 128) and block_size >= 32
    if capability != 90 or itemsize != 2 or not fits:
        return None
    keys = min(block_size, 64)
    return UnitTile(_ROWS // group, keys, ring.stages(itemsize * keys * sum(widths)))


def together(group: int) -> int:
    """Tokens of a warpgroup that must want a block for it to be multiplied as one: three quarters of the 64 rows."""
    return -(-48 // group)


def supports(query: Array, value: Array, scale: float, block_size: int, window_size: int) -> bool:
    """Whether these kernels do what is asked, on the device that is used."""
    return scale > 0 and not window_size and _tile(query, value, block_size) is not None


def _tile(query: Array, value: Array, block_size: int) -> UnitTile | None:
    from nsa_jax.kernels import selected

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = device.capability_of(selected.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return tile_of(capability, (K, V), query.dtype.itemsize, N // H, block_size)


def walk(choice: Choice, query: Array, value: Array, spec: Spec) -> PairedWalks:
    """What the passes of the queries walk."""
    return walks_in_pairs(choice, _tile(query, value, spec.block_size).tokens, spec.block_size)


def forward(query: Array, key: Array, value: Array, routes: Routes, spec: Spec) -> list[tuple[Array, Array]]:
    """As `gpu.selected.forward`."""
    from nsa_jax.kernels.sm90 import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    arrays, last = (query, key, value), (routes.sight,)
    output, lse = _walk("selected_forward", kernels.forward, arrays, outputs, K + V, routes, spec, last)
    return [(output, lse)]


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
    from nsa_jax.kernels.sm90 import selected as kernels

    (branch,) = branches
    (_, T, N, K), V = query.shape, value.shape[3]
    lse, d_lse, weight, into = branch.placeholders(query, before)
    d_query, delta = _walk(
        "selected_backward_query",
        kernels.backward_query,
        (query, key, value, d_output, branch.output, lse, weight, d_lse, into),
        (jax.ShapeDtypeStruct((T, N, K), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)),
        2 * K + V,
        routes,
        spec,
        HAS_D_LSE=branch.d_lse is not None,
        HAS_BEFORE=before is not None,
    )
    return d_query, [delta]


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics], choice: Choice, spec: Spec
) -> tuple[Array, Array]:
    """As `gpu.selected.backward_key_value`; blocks of fewer keys than a program has go to the portable kernels."""
    from nsa_jax.kernels.selected_shape import KeyRingShape
    from nsa_jax.kernels.sm90 import selected_keys as kernels

    keys = kernels.KEYS.value
    if spec.block_size < keys:
        return portable.backward_key_value(query, key, value, d_output, rows, choice, spec)
    sizes = _sizes(query, value, spec) | {"KEYS": keys, "STAGES": key_pass.stages(query.shape[3], value.shape[3])}

    def run(query, key, value, d_output, *arrays, sizes_of_items, **options):
        shape = KeyRingShape(**sizes, **sizes_of_items)
        return launch.launch(
            kernels.backward_key_value,
            launch.token_pieces(query, shape.G),
            launch.key_pieces(key),
            launch.key_pieces(value),
            launch.token_pieces(d_output, shape.G),
            *arrays,
            programs=shape.PIECES * shape.PROGRAMS * shape.H * query.shape[0],
            warps=4,
            stages=1,
            registers=key_pass.REGISTERS,
            SHAPE=shape,
            **options,
        )

    return selected_keys.by_items(run, query, key, value, d_output, rows, choice, spec)


def _sizes(query: Array, value: Array, spec: Spec) -> dict:
    """The fields that the shapes of all kernels here have."""
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "BLOCK": spec.block_size}


def _walk(name, kernel, arrays, outputs, products, routes, spec, last=(), **constants) -> list[Array]:
    """Runs a kernel on arrays that begin with query, key and value; products: multiplications per head and key."""
    from nsa_jax.kernels.selected_shape import PairedShape

    query, _, value = arrays[:3]
    walks, tile, sizes = routes.walks, _tile(query, value, spec.block_size), _sizes(query, value, spec)
    pairs, _, entries = walks.begins.shape[2:]

    def run(query, key, value, *arrays):
        B, T, N, _ = query.shape
        units = pairs * sizes["H"] * B
        shape = PairedShape(
            **sizes,
            KEYS=tile.keys,
            TOKENS=tile.tokens,
            ENTRIES=entries,
            TOGETHER=together(sizes["G"]),
            TILES=pairs,
            UNITS=units,
            # one program fits on each multiprocessor; a pair goes through its share of the units
            PROGRAMS=min(units, max(1, device.multiprocessors() // 2)),
            STAGES=tile.stages,
        )
        return launch.launch(
            kernel,
            query,
            *[launch.key_pieces(x, tile.keys) for x in (key, value)],
            *arrays,
            name=name,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=shape.PROGRAMS,
            warps=8,
            stages=1,
            flops=2 * B * T * N * entries // tile.tokens * spec.block_size * products,
            SHAPE=shape,
            **constants,
        )

    return transforms.fold_vmap(run)(*arrays, routes.choice.row.queries.place, *walks, *last)
