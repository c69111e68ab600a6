"""Selected attention: every query attends to the blocks chosen for it (arXiv 2502.11089, equation 12)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import checks, launch, reference, segments, selected_hopper, tiling
from nsa_jax.inverse import invert, more_items
from nsa_jax.residuals import Branch, name_residuals, nothing_seen, or_placeholders, untouched
from nsa_jax.segments import Blocks
from nsa_jax.walk import NOWHERE, Choice, PairedWalks, Walks, choose, walks, walks_in_pairs

Array = jax.Array


class Spec(NamedTuple):
    """What is static about a call.

    Attributes:
        block_size: keys in a block.
        scale: factor on the scores.
        precision: of float32 products, see `launch.dot_precision`.
        window_size: keys in the sliding window that is attended to in the same pass; 0 for none.
    """

    block_size: int
    scale: float
    precision: str
    window_size: int = 0


class Routes(NamedTuple):
    """Which blocks the queries want, and how the kernels that go from the queries' side walk them."""

    choice: Choice
    walks: Walks | PairedWalks | None  # None where no block is wanted


def selected_attention(
    query: Array,
    key: Array,
    value: Array,
    block_indices: Array,
    *,
    block_counts: Array | int | None = None,
    block_size: int = 64,
    scale: float | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention to the listed blocks of the query's segment.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 12 and section 3.4.

    Args:
        query: [B, T, N, K], bfloat16, float16 or float32.
        key: [B, T, H, K], of query's dtype; N is a multiple of H.
        value: [B, T, H, V], of query's dtype.
        block_indices: integers [B, T, H, S], counted from the segment's first token: block j holds its positions
            [j * block_size, (j + 1) * block_size). An entry below 0 or beyond the query's own block is skipped, one
            that is listed twice counts once; the order does not matter.
        block_counts: how many of the first entries count: None for all, an int, or integers [B, T, H].
        block_size: tokens in a block, a power of two from 16 to 128.
        scale: factor on the scores, K ** -0.5 unless given.
        segment_ids: integers [B, T]; tokens attend within their run of equal ids, negative ids are padding.
            None: every row is one segment.
        implementation: "triton", "xla" (plain jnp, any device), or None for Triton on an NVIDIA GPU and jnp elsewhere.
        return_residual: also return the log-sum-exp.

    Returns:
        The output [B, T, N, V] in query's dtype; with return_residual also the lse, float32 [B, T, N], natural log.
        Where a query sees nothing the output is 0, the lse -inf and every gradient 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, value or dtype.
        ImportError: implementation is "triton", and Triton or jax-triton is not installed.
    """
    checks.attention_arrays(query, key, value)
    block_indices = checks.block_indices(block_indices, query, key)
    if block_counts is not None:
        block_counts = checks.block_counts(block_counts, query, key)
    block_size = checks.block_size(block_size)
    scale = checks.scale(scale, query)
    segment_ids = checks.segment_ids(segment_ids, query)
    run = _triton if checks.resolve_implementation(implementation) == "triton" else reference.selected_attention
    output, lse = run(
        query, key, value, block_indices,
        block_counts=block_counts, block_size=block_size, scale=scale, segment_ids=segment_ids,
    )  # fmt: skip
    # zero there already; this drops the cotangent, which may be NaN
    output = segments.clear_padding(output, segment_ids)
    return (output, lse) if return_residual else output


def _triton(query, key, value, block_indices, *, block_counts, block_size, scale, segment_ids):
    if block_counts is not None:
        block_counts = jnp.asarray(block_counts, jnp.int32)
    query, key, value, block_indices, block_counts, segment_ids = launch.vary_together(
        (query, key, value, block_indices, block_counts, segment_ids)
    )
    query, key, value = (segments.clear_padding(x, segment_ids) for x in (query, key, value))
    choice = choose(block_indices, block_counts, segment_ids, block_size)
    spec = Spec(block_size, scale, launch.dot_precision())
    return attend(spec, query, key, value, route(query, value, choice, spec))


def _shape(query: Array, value: Array, spec: Spec) -> dict:
    """The fields that the shapes of all kernels of kernels/selected.py have, but for the sizes of tiles."""
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {
        "T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "WINDOW": spec.window_size,
        "BLOCK": spec.block_size, "K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V), "PRECISION": spec.precision,
    }  # fmt: skip


def _columns(shape: dict) -> int:
    return sum(shape["K_PARTS"]) + sum(shape["V_PARTS"])


def _wanted(choice: Choice) -> int:
    """The most blocks a query wants."""
    return choice.selected.shape[3] + choice.touched.shape[2]


def route(query: Array, value: Array, choice: Choice, spec: Spec) -> Routes:
    """The Routes of a choice."""
    if _wanted(choice) == 0:
        return Routes(choice, None)
    if tile := _hopper_tile(query, value, spec):
        return Routes(choice, walks_in_pairs(choice, tile.tokens, spec.block_size))
    tokens = tiling.selected_tokens(query.shape[2] // value.shape[2])
    return Routes(choice, walks(choice, tokens, spec.block_size, spec.window_size))


def _hopper_tile(query: Array, value: Array, spec: Spec) -> tiling.HopperTile | None:
    return selected_hopper.tile_for(query, value, spec.block_size, spec.scale, spec.window_size)


def _walk(kernel, pick, arrays, sight, outputs, products: int, routes: Routes, spec: Spec, **constants) -> list[Array]:
    """Runs a kernel that goes from the queries' side.

    Args:
        kernel: of kernels/selected.py.
        pick: of tiling.py, gives its tile.
        arrays: query, key, value and what else it takes before the place.
        sight: what it takes after the walks.
        outputs: shapes and dtypes, of one row.
        products: multiplications per query head and key.
        routes: see `Routes`.
        spec: see `Spec`.
        **constants: that the kernel has beside those of all.
    """
    from nsa_jax.kernels.selected_shape import QueryShape

    query, _, value = arrays[:3]
    shape = _shape(query, value, spec)
    S, G, capability = _wanted(routes.choice), shape["G"], launch.capability_of(kernel)
    tile = pick(capability, _columns(shape), query.dtype.itemsize, G, spec.block_size)
    tokens = tiling.selected_tokens(G)

    def run(query, key, value, *arrays):
        B, T, N, _ = query.shape
        tiles = -(-T // tokens)
        return launch.launch(
            kernel, query, *launch.key_tiles(kernel, tile.keys, key, value), *arrays,
            outputs=[jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for x in outputs],
            programs=tiles * shape["H"] * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * products,
            SHAPE=QueryShape(
                **shape, ROWS=tile.rows, KEYS=tile.keys, TOKENS=tokens, ENTRIES=tokens * S,
                AHEAD=tiling.selected_ahead(capability),
            ),
            **constants,
        )  # fmt: skip

    return launch.fold_vmap(run)(*arrays, routes.choice.place, *routes.walks, *sight)


def _sight(choice: Choice) -> tuple[Array, Array]:
    """int8 [B, T, H] for the selected and for the sliding branch: 1 where the query sees something, else 0."""
    selected = jnp.any(choice.selected < NOWHERE, axis=3)
    sliding = jnp.broadcast_to(jnp.any(choice.touched < NOWHERE, axis=2)[..., None], selected.shape)
    return selected.astype(jnp.int8), sliding.astype(jnp.int8)


def forward(query: Array, key: Array, value: Array, routes: Routes, spec: Spec) -> list[tuple[Array, Array]]:
    """(output [B, T, N, V], lse float32 [B, T, N]) of the selected branch, then of the sliding one if any."""
    from nsa_jax.kernels import selected as kernels

    if _wanted(routes.choice) == 0:
        return [nothing_seen(query, value)]
    if tile := _hopper_tile(query, value, spec):
        walk = routes.choice.place, routes.walks, _sight(routes.choice)[0], tile, spec.block_size, spec.scale
        return [selected_hopper.forward(query, key, value, *walk)]
    (_, T, N, K), V = query.shape, value.shape[3]
    branch = jax.ShapeDtypeStruct((T, N, V), query.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)
    placeholder = [jax.ShapeDtypeStruct((1,) * len(x.shape), x.dtype) for x in branch]
    outputs = (*branch, *(branch if spec.window_size else placeholder))
    arrays = (query, key, value)
    output, lse, *sliding = _walk(
        kernels.forward, tiling.selected_forward, arrays, _sight(routes.choice), outputs, K + V, routes, spec
    )
    return [(output, lse), tuple(sliding)] if spec.window_size else [(output, lse)]


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branches: list[Branch], routes: Routes, spec: Spec,
    before: Array | None = None,
) -> tuple[Array, list[Array]]:  # fmt: skip
    """(d_query [B, T, N, K], added to `before` if given; deltas float32 [B, T, N] of the branches, for
    `backward_key_value`); branches as `forward` gives them, of which only the selected one's lse may have a cotangent.
    """
    from nsa_jax.kernels import selected as kernels

    if _wanted(routes.choice) == 0:
        return untouched(query, before), [jnp.zeros_like(branch.lse) for branch in branches]
    if tile := _hopper_tile(query, value, spec):
        walk = routes.choice.place, routes.walks, tile, spec.block_size, spec.scale
        d_query, delta = selected_hopper.backward_query(query, key, value, d_output, branches[0], *walk, before)
        return d_query, [delta]
    (_, T, N, K), V = query.shape, value.shape[3]
    delta = jax.ShapeDtypeStruct((T, N), jnp.float32)
    second = delta if spec.window_size else jax.ShapeDtypeStruct((1, 1), jnp.float32)
    lse, d_lse, weight, into = or_placeholders(branches[0], query, before)
    near = branches[-1]
    d_query, *deltas = _walk(
        kernels.backward_query, tiling.selected_backward_query,
        (
            query, key, value, d_output, branches[0].output, lse, weight, near.output, near.lse, near.weight,
            d_lse, into,
        ),
        (),
        (jax.ShapeDtypeStruct((T, N, K), query.dtype), delta, second), 2 * K + V, routes, spec,
        HAS_D_LSE=branches[0].d_lse is not None, HAS_BEFORE=before is not None,
    )  # fmt: skip
    return d_query, deltas[: len(branches)]


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, branches: list[Branch], deltas: list[Array],
    routes: Routes, spec: Spec,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_key [B, C, H, K], d_value [B, C, H, V]); branches and deltas as in `backward_query`."""
    from nsa_jax.kernels import selected_keys as kernels
    from nsa_jax.kernels.selected_shape import KeyShape

    choice = routes.choice
    T, S = query.shape[1], _wanted(choice)
    if S == 0:
        return jnp.zeros_like(key), jnp.zeros_like(value)
    shape = _shape(query, value, spec)
    capability = launch.capability_of(kernels.backward_key_value)
    tile = tiling.selected_backward_key_value(capability, _columns(shape), key.dtype.itemsize, spec.block_size)
    chunk = tiling.selected_chunk(capability)
    stretch = tiling.selected_stretch(capability)
    more = more_items(T, S, spec.block_size, chunk, stretch)
    kind = jnp.float32 if more else key.dtype  # what several items give is added in float32

    def run(query, key, value, *arrays):
        B, _, N, K = query.shape
        C, H, V = value.shape[1:]
        arrays, token_walks, blocks = arrays[:8], Walks(*arrays[8:12]), Blocks(*arrays[12:])
        items = invert(token_walks, blocks, spec.block_size, chunk, stretch)
        programs = -(-C // spec.block_size) + more
        near = jnp.full_like(blocks.begin, spec.block_size + spec.window_size)
        outputs = (
            *(jax.ShapeDtypeStruct((B, C, H, width), kind) for width in (K, V)),
            *(jax.ShapeDtypeStruct((B, H, max(more, 1), spec.block_size, width), jnp.float32) for width in (K, V)),
        )
        flops = 2 * B * T * N * S * spec.block_size * (2 * K + 2 * V)
        if selected_hopper.does_keys(query, value, spec.block_size, spec.scale, spec.window_size):
            d_key, d_value, d_key_more, d_value_more = selected_hopper.backward_key_value(
                query, key, value, *arrays[:4], arrays[7], items, blocks, near, outputs=outputs, programs=programs,
                scale=spec.scale, block_size=spec.block_size, more=max(more, 1), flops=flops,
            )  # fmt: skip
        else:
            d_key, d_value, d_key_more, d_value_more = launch.launch(
                kernels.backward_key_value, query, key, value, *arrays, *items.of_kernels(), blocks.begin, blocks.end,
                near, outputs=outputs, programs=spec.block_size // tile.keys * programs * H * B, warps=tile.warps,
                stages=tile.stages, flops=flops,
                SHAPE=KeyShape(
                    **shape, ROWS=tile.rows, KEYS=tile.keys, BLOCKS=blocks.begin.shape[1],
                    ITEMS=items.block.shape[2], MORE=max(more, 1), PROGRAMS=programs,
                ),
            )  # fmt: skip
        if not more:
            return d_key, d_value
        return [
            _combine(first, rest, items.further, blocks, key.dtype)
            for first, rest in ((d_key, d_key_more), (d_value, d_value_more))
        ]

    singles = walks(choice, 1, spec.block_size, spec.window_size)
    rows = [_without_dead(branch, delta) for branch, delta in zip(branches, deltas, strict=True)]
    d_key, d_value = launch.fold_vmap(run)(
        query, key, value, d_output, *rows[0], *rows[-1], choice.place, *singles, *choice.blocks
    )
    return d_key, d_value


def _without_dead(branch: Branch, delta: Array) -> tuple[Array, Array, Array]:
    """(lse, delta, weight), +inf, 0 and 0 in rows that see nothing or what is not finite."""
    dead = ~jnp.isfinite(branch.lse)
    return jnp.where(dead, jnp.inf, branch.lse), jnp.where(dead, 0.0, delta), jnp.where(dead, 0.0, branch.weight)


def _combine(first: Array, rest: Array, further: Array, blocks: Blocks, dtype) -> Array:
    """first [B, C, H, D] plus the further items of each block, in rest [B, H, MORE, block_size, D], as `dtype`."""
    from nsa_jax.kernels import selected_keys as kernels

    B, C, H, D = first.shape
    more, block_size = rest.shape[2:4]
    programs, keys = -(-C // block_size), 16
    (total,) = launch.launch(
        kernels.combine, first, rest, further, blocks.begin, blocks.end, blocks.count,
        outputs=(jax.ShapeDtypeStruct(first.shape, dtype),),
        programs=block_size // keys * programs * H * B, warps=4, stages=2, flops=rest.size,
        C=C, H=H, D=D, BLOCK=block_size, KEYS=keys, BLOCKS=blocks.begin.shape[1], MORE=more, PROGRAMS=programs,
        PARTS=tiling.parts(D),
    )  # fmt: skip
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, query: Array, key: Array, value: Array, routes: Routes) -> tuple[Array, Array]:
    """(output [B, T, N, V], lse float32 [B, T, N]) of attention to the selected blocks, by the Triton kernels."""
    return forward(query, key, value, routes, spec)[0]


def _attend_forward(spec, query, key, value, routes):
    output, lse = name_residuals("selected", *forward(query, key, value, routes, spec)[0])
    return (output, lse), (query, key, value, routes, output, lse)


def _attend_backward(spec, residuals, cotangents):
    query, key, value, routes, output, lse = residuals
    d_output, d_lse = cotangents
    branches = [Branch(output, lse, jnp.ones_like(lse), d_lse)]
    d_query, deltas = backward_query(query, key, value, d_output, branches, routes, spec)
    return d_query, *backward_key_value(query, key, value, d_output, branches, deltas, routes, spec), None


attend.defvjp(_attend_forward, _attend_backward)
