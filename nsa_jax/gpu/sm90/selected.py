"""Launches of kernels/sm90/selected.py and selected_keys.py: the selected branch on Hopper."""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Branch, Statistics
from nsa_jax.gpu.portable import selected as portable
from nsa_jax.gpu.selected import Routes, Spec
from nsa_jax.gpu.walks import Choice, PairedWalks, walks_in_pairs
from nsa_jax.runtime import device, launch, transforms

Array = jax.Array


def supports(query: Array, value: Array, scale: float, block_size: int, window_size: int) -> bool:
    """Whether these kernels do what is asked, on the device that is used."""
    return scale > 0 and not window_size and _tile(query, value, block_size) is not None


def _tile(query: Array, value: Array, block_size: int) -> tiling.HopperTile | None:
    from nsa_jax.kernels import selected

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = device.capability_of(selected.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return tiling.selected_hopper(capability, (K, V), query.dtype.itemsize, N // H, block_size)


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
    query: Array, key: Array, value: Array, d_output: Array, branches: list[Branch], routes: Routes, spec: Spec,
    before: Array | None = None,
) -> tuple[Array, list[Array]]:  # fmt: skip
    """As `gpu.selected.backward_query`."""
    from nsa_jax.kernels.sm90 import selected as kernels

    (branch,) = branches
    (_, T, N, K), V = query.shape, value.shape[3]
    outputs = jax.ShapeDtypeStruct((T, N, K), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    lse, d_lse, weight, into = branch.placeholders(query, before)
    d_query, delta = _walk(
        "selected_backward_query", kernels.backward_query,
        (query, key, value, d_output, branch.output, lse, weight, d_lse, into), outputs,
        2 * K + V, routes, spec, HAS_D_LSE=branch.d_lse is not None, HAS_BEFORE=before is not None,
    )  # fmt: skip
    return d_query, [delta]


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: list[Statistics], choice: Choice, spec: Spec
) -> tuple[Array, Array]:
    """As `gpu.selected.backward_key_value`; blocks of fewer keys than a program has go to the portable kernels."""
    if spec.block_size < tiling.HOPPER_KEYS:
        return portable.backward_key_value(query, key, value, d_output, rows, choice, spec)
    from nsa_jax.kernels.selected_shape import KeyRingShape
    from nsa_jax.kernels.sm90 import selected_keys as kernels

    def run(query, key, value, statistics, place, items, blocks, outputs, programs, flops):
        (B, T, N, K), (_, C, H, V) = query.shape, value.shape
        d_output, *statistics = statistics
        return launch.launch(
            kernels.backward_key_value, launch.token_pieces(query, N // H), launch.key_pieces(key),
            launch.key_pieces(value), launch.token_pieces(d_output, N // H), *statistics, place, *items.of_kernels(),
            blocks.begin, blocks.end, blocks.near,
            name="selected_backward_key_value", outputs=outputs,
            programs=spec.block_size // tiling.HOPPER_KEYS * programs * H * B, warps=4, stages=1,
            registers=tiling.HOPPER_KEYS_REGISTERS, flops=flops,
            SHAPE=KeyRingShape(
                T=T, C=C, H=H, G=N // H, K=K, V=V, SCALE=spec.scale, BLOCK=spec.block_size, KEYS=tiling.HOPPER_KEYS,
                BLOCKS=blocks.begin.shape[1], ITEMS=items.block.shape[2], MORE=outputs[2].shape[2], PROGRAMS=programs,
                STAGES=tiling.hopper_keys_stages(K, V),
            ),
        )  # fmt: skip

    capability = device.capability_of(kernels.backward_key_value)
    return portable.by_items(run, capability, query, key, value, d_output, rows, choice, spec)


def _walk(name, kernel, arrays, outputs, products, routes, spec, last=(), **constants) -> list[Array]:
    """Runs a kernel on arrays that begin with query, key and value; products: multiplications per head and key."""
    walks, block_size, tile = routes.walks, spec.block_size, _tile(arrays[0], arrays[2], spec.block_size)
    from nsa_jax.kernels.selected_shape import PairedShape

    (_, T, N, K), (_, C, H, V) = arrays[0].shape, arrays[2].shape
    pairs, _, entries = walks.begins.shape[2:]

    def run(query, key, value, *arrays):
        B = query.shape[0]
        units = pairs * H * B
        # of programs one fits on each multiprocessor; a pair goes through its share of the units
        programs = min(units, max(1, device.multiprocessors() // 2))
        blocks = [launch.key_pieces(x, tile.keys) for x in (key, value)]
        return launch.launch(
            kernel, query, *blocks, *arrays, name=name,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=programs, warps=8, stages=1,
            flops=2 * B * T * N * entries // tile.tokens * block_size * products,
            SHAPE=PairedShape(
                T=T, C=C, H=H, G=N // H, K=K, V=V, SCALE=spec.scale, BLOCK=block_size, KEYS=tile.keys,
                TOKENS=tile.tokens, ENTRIES=entries, TOGETHER=tiling.hopper_together(N // H), TILES=pairs, UNITS=units,
                PROGRAMS=programs, STAGES=tile.stages,
            ),
            **constants,
        )  # fmt: skip

    return transforms.fold_vmap(run)(*arrays, routes.choice.row.queries.place, *walks, *last)
