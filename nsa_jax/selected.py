"""Selected attention: every query attends to the blocks chosen for it (arXiv 2502.11089, equation 12)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import checks, launch, reference, segments, tiling
from nsa_jax.inverse import NOWHERE, invert, more_items
from nsa_jax.residuals import name_residuals, ungated_delta
from nsa_jax.segments import Blocks

Array = jax.Array


class Spec(NamedTuple):
    """What is static about a call.

    Attributes:
        block_size: keys in a block.
        scale: factor on the scores.
        precision: of float32 products, see `launch.dot_precision`.
    """

    block_size: int
    scale: float
    precision: str


class Choice(NamedTuple):
    """Which keys are chosen.

    Attributes:
        first_keys: int32 [B, T, H, S], the row index of the first key of each chosen block, NOWHERE where none; any order,
            repeats allowed.
        place: int32 [B, T], the query's index in the key row.
        blocks: the blocks of the key row.
    """

    first_keys: Array
    place: Array
    blocks: Blocks


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
            [j * block_size, (j + 1) * block_size). An entry below 0 or beyond the query's own block is skipped, one that is
            listed twice counts once; the order does not matter.
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
    B, T, N, _ = query.shape
    if block_indices.shape[3] == 0:
        return jnp.zeros((B, T, N, value.shape[-1]), query.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    if block_counts is not None:
        block_counts = jnp.asarray(block_counts, jnp.int32)
    query, key, value, block_indices, block_counts, segment_ids = launch.vary_together(
        (query, key, value, block_indices, block_counts, segment_ids)
    )
    query, key, value = (segments.clear_padding(x, segment_ids) for x in (query, key, value))
    choice = choose(block_indices, block_counts, segment_ids, block_size)
    return attend(Spec(block_size, scale, launch.dot_precision()), query, key, value, choice)


def choose(block_indices: Array, block_counts: Array | None, segment_ids: Array | None, block_size: int) -> Choice:
    """The Choice that block indices [B, T, H, S] make, of which the first block_counts (), [B, T, H] or None count, where
    query i stands at key i."""
    B, T, _, S = block_indices.shape
    tokens = segments.layout(segment_ids, B, T)
    keep = (block_indices >= 0) & (block_indices <= (tokens.position // block_size)[:, :, None, None])
    keep &= tokens.valid[:, :, None, None]
    if block_counts is not None:
        counts = jnp.broadcast_to(block_counts, block_indices.shape[:3])
        keep &= jax.lax.broadcasted_iota(jnp.int32, block_indices.shape, 3) < counts[..., None]
    first_keys = tokens.start[:, :, None, None] + jnp.where(keep, block_indices, 0) * block_size
    blocks = segments.blocks(tokens, block_size, segments.most_blocks(segment_ids, T, block_size))
    return Choice(jnp.where(keep, first_keys, NOWHERE), tokens.start + tokens.position, blocks)


class Walks(NamedTuple):
    """What each tile of tokens walks, see kernels/walk.py."""

    begins: Array
    members: Array
    counts: Array


def _walks(first_keys: Array, tokens: int) -> Walks:
    """first_keys [B, T, H, S] -> the Walks of tiles of `tokens` tokens."""
    from nsa_jax.kernels import walk as kernels

    def run(first_keys):
        B, T, H, S = first_keys.shape
        tiles = -(-T // tokens)
        shape = (B, H, tiles, tokens * S)
        sides = tiling.power_of_two(tokens), tiling.power_of_two(S)
        units = tiling.walk_units(sides[0] * sides[1])
        return launch.launch(
            kernels.walk, first_keys,
            outputs=[jax.ShapeDtypeStruct(s, jnp.int32) for s in (shape, shape, shape[:3])],
            programs=-(-tiles // units) * H * B, warps=4, stages=1, flops=0,
            T=T, H=H, S=S, TOKENS=tokens, UNITS=units, TILES=tiles, TOKENS_SIDE=sides[0], S_SIDE=sides[1],
        )  # fmt: skip

    return Walks(*launch.fold_vmap(run)(first_keys))


def _constants(query: Array, value: Array, spec: Spec) -> dict:
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {
        "T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "PRECISION": spec.precision,
        "K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V),
    }  # fmt: skip


def _columns(constants: dict) -> int:
    return sum(constants["K_PARTS"]) + sum(constants["V_PARTS"])


def _tokens_and_tile(kernel, choose, constants: dict, spec: Spec, dtype) -> tuple[int, tiling.Tile]:
    """Tokens per tile of a walking kernel, and the tile."""
    tile = choose(launch.capability_of(kernel), _columns(constants), dtype.itemsize, constants["G"], spec.block_size)
    return max(1, min(32, tile.rows // constants["G"])), tile


def forward(query: Array, key: Array, value: Array, choice: Choice, spec: Spec) -> tuple[Array, Array]:
    """(output [B, T, N, V], lse float32 [B, T, N])."""
    from nsa_jax.kernels import selected as kernels

    constants = _constants(query, value, spec)
    S = choice.first_keys.shape[3]
    tokens, tile = _tokens_and_tile(kernels.forward, tiling.selected_forward, constants, spec, query.dtype)
    walks = _walks(choice.first_keys, tokens)

    def run(query, *arrays):
        B, T, N, K = query.shape
        H, V = arrays[1].shape[2:]
        tiles = -(-T // tokens)
        return launch.launch(
            kernels.forward, query, *arrays,
            outputs=(jax.ShapeDtypeStruct((B, T, N, V), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * (K + V),
            S=S, TOKENS=tokens, ROWS=tile.rows, KEYS=tile.keys, SHARES=spec.block_size // tile.keys, TILES=tiles, **constants,
        )  # fmt: skip

    output, lse = launch.fold_vmap(run)(query, key, value, choice.place, *walks)
    return output, lse


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, lse: Array, delta: Array, weight: Array,
    choice: Choice, spec: Spec,
) -> Array:  # fmt: skip
    """d_query [B, T, N, K], for the output cotangent weight * d_output; delta [B, T, N] is rowsum(d_output * output)."""
    from nsa_jax.kernels import selected as kernels

    constants = _constants(query, value, spec)
    S = choice.first_keys.shape[3]
    tokens, tile = _tokens_and_tile(
        kernels.backward_query, tiling.selected_backward_query, constants, spec, query.dtype
    )
    walks = _walks(choice.first_keys, tokens)

    def run(*arrays):
        B, T, N, K = arrays[0].shape
        H, V = arrays[2].shape[2:]
        tiles = -(-T // tokens)
        return launch.launch(
            kernels.backward_query, *arrays,
            outputs=(jax.ShapeDtypeStruct((B, T, N, K), query.dtype),),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * (2 * K + V),
            S=S, TOKENS=tokens, ROWS=tile.rows, KEYS=tile.keys, SHARES=spec.block_size // tile.keys, TILES=tiles, **constants,
        )  # fmt: skip

    (d_query,) = launch.fold_vmap(run)(query, key, value, d_output, lse, delta, weight, choice.place, *walks)
    return d_query


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, lse: Array, delta: Array, weight: Array,
    choice: Choice, spec: Spec,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_key [B, C, H, K], d_value [B, C, H, V]); arguments as in `backward_query`."""
    from nsa_jax.kernels import selected as kernels

    constants = _constants(query, value, spec)
    T, S = query.shape[1], choice.first_keys.shape[3]
    capability = launch.capability_of(kernels.backward_key_value)
    tile = tiling.selected_backward_key_value(capability, _columns(constants), key.dtype.itemsize, spec.block_size)
    chunk = tiling.selected_chunk(capability)
    more = more_items(T, S, chunk)
    # what several items give is added in float32
    kind = jnp.float32 if more else key.dtype

    def run(query, key, value, d_output, lse, delta, weight, place, begins, *blocks):
        B, _, N, K = query.shape
        C, H, V = value.shape[1:]
        blocks = Blocks(*blocks)
        items = invert(begins, blocks, chunk)
        programs = -(-C // spec.block_size) + more
        shares = spec.block_size // tile.keys
        d_key, d_value, d_key_more, d_value_more = launch.launch(
            kernels.backward_key_value, query, key, value, d_output, lse, delta, weight, place, *items,
            blocks.begin, blocks.end, blocks.count,
            outputs=(
                *(jax.ShapeDtypeStruct((B, C, H, width), kind) for width in (K, V)),
                *(jax.ShapeDtypeStruct((B, H, max(more, 1), spec.block_size, width), jnp.float32) for width in (K, V)),
            ),
            programs=shares * programs * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * T * N * S * spec.block_size * (2 * K + 2 * V),
            BLOCK=spec.block_size, ROWS=tile.rows, KEYS=tile.keys, CHUNK=chunk, BLOCKS=blocks.begin.shape[1],
            ITEMS=items.item_block.shape[2], MORE=max(more, 1), PROGRAMS=programs, **constants,
        )  # fmt: skip
        if not more:
            return d_key, d_value
        return [
            _combine(first, rest, items.item_first, blocks, tile.keys, key.dtype)
            for first, rest in ((d_key, d_key_more), (d_value, d_value_more))
        ]

    begins = _walks(choice.first_keys, 1).begins
    d_key, d_value = launch.fold_vmap(run)(
        query, key, value, d_output, lse, delta, weight, choice.place, begins, *choice.blocks
    )
    return d_key, d_value


def _combine(first: Array, rest: Array, item_first: Array, blocks: Blocks, keys: int, dtype) -> Array:
    """first [B, C, H, D] plus what the further items of each block hold in rest [B, H, MORE, block_size, D], in `dtype`."""
    from nsa_jax.kernels import selected as kernels

    B, C, H, D = first.shape
    more, block_size = rest.shape[2:4]
    programs = -(-C // block_size)
    (total,) = launch.launch(
        kernels.combine, first, rest, item_first, blocks.begin, blocks.end, blocks.count,
        outputs=(jax.ShapeDtypeStruct(first.shape, dtype),),
        programs=block_size // keys * programs * H * B, warps=4, stages=2, flops=rest.size,
        C=C, H=H, D=D, BLOCK=block_size, KEYS=keys, BLOCKS=blocks.begin.shape[1], MORE=more, PROGRAMS=programs,
        PARTS=tiling.parts(D),
    )  # fmt: skip
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, query: Array, key: Array, value: Array, choice: Choice) -> tuple[Array, Array]:
    """(output [B, T, N, V], lse float32 [B, T, N]) of attention to the chosen blocks, by the Triton kernels."""
    return forward(query, key, value, choice, spec)


def _attend_forward(spec, query, key, value, choice):
    output, lse = name_residuals("selected", *forward(query, key, value, choice, spec))
    return (output, lse), (query, key, value, choice, output, lse)


def _attend_backward(spec, residuals, cotangents):
    query, key, value, choice, output, lse = residuals
    d_output, d_lse = cotangents
    delta = ungated_delta(d_output, d_lse, output, lse)
    arguments = (query, key, value, d_output, lse, delta, jnp.ones_like(lse), choice, spec)
    return backward_query(*arguments), *backward_key_value(*arguments), None


attend.defvjp(_attend_forward, _attend_backward)
