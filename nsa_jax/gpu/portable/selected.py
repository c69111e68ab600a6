"""Launches of kernels/selected.py: the selected branch on any GPU."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.inverse import Items, invert, more_items
from nsa_jax.gpu.selected import Routes, Spec
from nsa_jax.gpu.walks import Choice, Walks, walks
from nsa_jax.rows.blocks import Blocks, blocks
from nsa_jax.runtime import device, launch, transforms

Array = jax.Array


def supports(query: Array, value: Array, scale: float, block_size: int, window_size: int) -> bool:
    """Whether these kernels do what is asked: they always do."""
    return True


def _shape(query: Array, value: Array, spec: Spec) -> dict:
    """The fields that the shapes of all kernels of the selected branch have, but for the sizes of tiles."""
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {
        "T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "WINDOW": spec.window_size,
        "BLOCK": spec.block_size, "K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V), "PRECISION": spec.precision,
    }  # fmt: skip


def _columns(shape: dict) -> int:
    return sum(shape["K_PARTS"]) + sum(shape["V_PARTS"])


def walk(choice: Choice, query: Array, value: Array, spec: Spec) -> Walks:
    """What the passes of the queries walk."""
    tokens = tiling.selected_tokens(query.shape[2] // value.shape[2])
    return walks(choice, tokens, spec.block_size, spec.window_size)


def _walk(name, kernel, pick, arrays, outputs, products: int, routes: Routes, spec: Spec, last=(), **constants):
    """Runs a kernel that goes from the queries' side.

    Args:
        name: of the pass, for profiles.
        kernel: of kernels/selected.py.
        pick: of tiling.py, gives its tile.
        arrays: query, key, value and what else it takes before the place.
        outputs: shapes and dtypes, of one row.
        products: multiplications per query head and key.
        routes: see `Routes`.
        spec: see `Spec`.
        last: arrays that it takes after the walks.
        **constants: that the kernel has beside those of all.
    """
    from nsa_jax.kernels.selected_shape import QueryShape

    query, _, value = arrays[:3]
    shape = _shape(query, value, spec)
    S, G, capability = routes.choice.wanted, shape["G"], device.capability_of(kernel)
    tile = pick(capability, _columns(shape), query.dtype.itemsize, G, spec.block_size)
    tokens = tiling.selected_tokens(G)

    def run(query, key, value, *arrays):
        B, T, N, _ = query.shape
        tiles = -(-T // tokens)
        return launch.launch(
            kernel, query, *launch.key_tiles(kernel, tile.keys, key, value), *arrays, name=name,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=tiles * shape["H"] * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * products,
            SHAPE=QueryShape(
                **shape, ROWS=tile.rows, KEYS=tile.keys, TOKENS=tokens, ENTRIES=tokens * S,
                AHEAD=tiling.selected_ahead(capability),
            ),
            **constants,
        )  # fmt: skip

    return transforms.fold_vmap(run)(*arrays, routes.choice.row.queries.place, *routes.walks, *last)


def forward(query: Array, key: Array, value: Array, routes: Routes, spec: Spec) -> list[tuple[Array, Array]]:
    """As `gpu.selected.forward`."""
    from nsa_jax.kernels import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    branch = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    placeholder = [jax.ShapeDtypeStruct((1,) * len(x.shape), x.dtype) for x in branch]
    outputs = (*branch, *(branch if spec.window_size else placeholder))
    arrays = (query, key, value)
    sights = routes.sight, routes.sliding_sight
    output, lse, *sliding = _walk(
        "selected_forward", kernels.forward, tiling.selected_forward, arrays, outputs, K + V, routes, spec, sights
    )
    return [(output, lse), tuple(sliding)] if spec.window_size else [(output, lse)]


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branches: list[Branch], routes: Routes, spec: Spec,
    before: Array | None = None,
) -> tuple[Array, list[Array]]:  # fmt: skip
    """As `gpu.selected.backward_query`."""
    from nsa_jax.kernels import selected as kernels

    (_, T, N, K), V = query.shape, value.shape[3]
    delta = jax.ShapeDtypeStruct((T, N), jnp.float32)
    second = delta if spec.window_size else jax.ShapeDtypeStruct((1, 1), jnp.float32)
    lse, d_lse, weight, into = branches[0].placeholders(query, before)
    near = branches[-1]
    d_query, *deltas = _walk(
        "selected_backward_query", kernels.backward_query, tiling.selected_backward_query,
        (
            query, key, value, d_output, branches[0].output, lse, weight, near.output, near.lse, near.weight,
            d_lse, into,
        ),
        (jax.ShapeDtypeStruct((T, N, K), query.dtype), delta, second), 2 * K + V, routes, spec,
        HAS_D_LSE=branches[0].d_lse is not None, HAS_BEFORE=before is not None,
    )  # fmt: skip
    return d_query, deltas[: len(branches)]


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics], choice: Choice, spec: Spec
) -> tuple[Array, Array]:
    """As `gpu.selected.backward_key_value`, of queries in the order of their places."""
    from nsa_jax.kernels import selected_keys as kernels
    from nsa_jax.kernels.selected_shape import KeyShape

    shape = _shape(query, value, spec)
    capability = device.capability_of(kernels.backward_key_value)
    tile = tiling.selected_backward_key_value(capability, _columns(shape), key.dtype.itemsize, spec.block_size)

    def run(query, key, value, statistics, place, items, blocks, outputs, programs, flops):
        (B, _, _, _), H = query.shape, value.shape[2]
        return launch.launch(
            kernels.backward_key_value, query, key, value, *statistics, place, *items.of_kernels(), blocks.begin,
            blocks.end, blocks.near,
            name="selected_backward_key_value", outputs=outputs,
            programs=spec.block_size // tile.keys * programs * H * B, warps=tile.warps, stages=tile.stages,
            flops=flops,
            SHAPE=KeyShape(
                **shape, ROWS=tile.rows, KEYS=tile.keys, BLOCKS=blocks.begin.shape[1], ITEMS=items.block.shape[2],
                MORE=outputs[2].shape[2], PROGRAMS=programs,
            ),
        )  # fmt: skip

    return by_items(run, capability, query, key, value, d_output, [rows[0], rows[-1]], choice, spec)


def by_items(
    run, capability: int, query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics],
    choice: Choice, spec: Spec,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_key, d_value) by a kernel that goes through the items of the inverse selection.

    Args:
        run: starts the kernel: (query, key, value, [d_output, *statistics], place, items, blocks, outputs, programs a
            head and row, flops) -> (d_key, d_value, d_key_more, d_value_more), see kernels/selected.py.
        capability: that it runs on.
        query, d_output, rows: in the order of the queries' places.
        key, value: cleaned.
        choice: of the queries in the order of their places.
        spec: see `Spec`.
    """
    T, S, row = query.shape[1], choice.wanted, choice.row
    chunk, stretch = tiling.selected_chunk(capability), tiling.selected_stretch(capability)
    more = more_items(T, row.length, S, spec.block_size, chunk, stretch, row.sliced)
    kind = jnp.float32 if more else key.dtype  # what several items give is added in float32
    statistics = [x for row in rows for x in row]
    count, of_walks = 1 + len(statistics), len(Walks._fields)

    def of_rows(query, key, value, *arrays):
        B, _, N, K = query.shape
        C, H, V = value.shape[1:]
        in_blocks = Blocks(*arrays[count + 1 + of_walks :])
        items = invert(Walks(*arrays[count + 1 : count + 1 + of_walks]), in_blocks, chunk, stretch, more)
        outputs = (
            *(jax.ShapeDtypeStruct((B, C, H, width), kind) for width in (K, V)),
            *(jax.ShapeDtypeStruct((B, H, max(more, 1), spec.block_size, width), jnp.float32) for width in (K, V)),
        )
        programs = -(-C // spec.block_size) + more
        flops = 2 * B * T * N * S * spec.block_size * (2 * K + 2 * V)
        d_key, d_value, d_key_more, d_value_more = run(
            query, key, value, arrays[:count], arrays[count], items, in_blocks, outputs, programs, flops
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
    programs, keys = -(-C // block_size), 16
    (total,) = launch.launch(
        kernels.combine, first, rest, items.further, blocks.begin, blocks.end, blocks.count, name="selected_combine",
        outputs=(jax.ShapeDtypeStruct(first.shape, dtype),),
        programs=block_size // keys * programs * H * B, warps=4, stages=2, flops=rest.size,
        C=C, H=H, D=D, BLOCK=block_size, KEYS=keys, BLOCKS=blocks.begin.shape[1], MORE=more, PROGRAMS=programs,
        PARTS=tiling.parts(D),
    )  # fmt: skip
    return total
