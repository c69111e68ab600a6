"""Attention to one interval of keys per query: launches and derivatives of the compressed and sliding branches."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import interval_hopper, launch, tiling
from nsa_jax.residuals import Branch, name_residuals, nothing_seen, or_placeholders, untouched
from nsa_jax.segments import Intervals

Array = jax.Array


class Spec(NamedTuple):
    """What is static about a call.

    Attributes:
        branch: "compressed" or "sliding", for names in profiles and checkpoint policies.
        scale: factor on the scores.
        precision: of float32 products, see `launch.dot_precision`.
        reach: most queries that see one key, 0 if any number can.
    """

    branch: str
    scale: float
    precision: str
    reach: int = 0


def _shape(query: Array, key: Array, value: Array, spec: Spec) -> dict:
    (_, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {
        "T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "SCALE": spec.scale, "PRECISION": spec.precision,
        "K_PARTS": tiling.parts(K), "V_PARTS": tiling.parts(V),
    }  # fmt: skip


def _pick(choose, kernel, shape: dict, dtype) -> tiling.Tile:
    capability = launch.capability_of(kernel)
    return choose(capability, sum(shape["K_PARTS"]) + sum(shape["V_PARTS"]), dtype.itemsize)


def _pairs(T: int, C: int, spec: Spec) -> int:
    """About how many (query, key) pairs a head computes, for profiles."""
    return T * spec.reach if spec.reach else T * C // 2


def _on_hopper(query: Array, key: Array, value: Array, spec: Spec) -> bool:
    """Whether the forward pass is that of kernels/sm90/interval.py."""
    most_seen = spec.reach or key.shape[1]
    return most_seen >= tiling.INTERVAL_HOPPER_KEYS and interval_hopper.fits(query, value, spec.scale)


def adds_up(query: Array, key: Array, value: Array, spec: Spec) -> bool:
    """Whether there is a `forward_and_sum`."""
    return _on_hopper(query, key, value, spec) and interval_hopper.fits_sum(query, value)


def forward_and_sum(
    query: Array, key: Array, value: Array, intervals: Intervals, spec: Spec, addends: interval_hopper.Addends
) -> tuple[Array | None, Array, Array]:
    """(output [B, T, N, V] if it is kept, lse float32 [B, T, N], gated sum [B, T, N, V])."""
    pairs = _pairs(query.shape[1], key.shape[1], spec)
    return interval_hopper.forward(query, key, value, intervals, spec.scale, pairs, addends)


def forward(query: Array, key: Array, value: Array, intervals: Intervals, spec: Spec) -> tuple[Array, Array]:
    """(output [B, T, N, V], lse float32 [B, T, N])."""
    from nsa_jax.kernels import interval as kernels

    if key.shape[1] == 0:
        return nothing_seen(query, value)
    if _on_hopper(query, key, value, spec):
        pairs = _pairs(query.shape[1], key.shape[1], spec)
        return interval_hopper.forward(query, key, value, intervals, spec.scale, pairs)[:2]
    shape = _shape(query, key, value, spec)
    tile = _pick(tiling.interval_forward, kernels.forward, shape, query.dtype)

    def run(query, key, value, key_begin, key_end, sight):
        B, T, N, K = query.shape
        C, H, V = value.shape[1:]
        tiles = -(-T * (N // H) // tile.rows)
        return launch.launch(
            kernels.forward, query, *launch.key_tiles(kernels.forward, tile.keys, key, value), key_begin, key_end,
            sight,
            outputs=(jax.ShapeDtypeStruct((B, T, N, V), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * _pairs(T, C, spec) * (K + V),
            ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, **shape,
        )  # fmt: skip

    sight = interval_hopper.sight(intervals, key.shape[2])
    output, lse = launch.fold_vmap(run)(query, key, value, intervals.key_begin, intervals.key_end, sight)
    return output, lse


def backward_query(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, intervals: Intervals, spec: Spec,
    before: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_query [B, T, N, K], added to `before` if given; delta float32 [B, T, N], for `backward_key_value`)."""
    from nsa_jax.kernels import interval as kernels

    if key.shape[1] == 0:
        return untouched(query, before), jnp.zeros_like(branch.lse)
    shape = _shape(query, key, value, spec)
    tile = _pick(tiling.interval_backward_query, kernels.backward_query, shape, query.dtype)

    def run(query, key, value, *arrays):
        B, T, N, K = query.shape
        C, H, V = value.shape[1:]
        tiles = -(-T * (N // H) // tile.rows)
        return launch.launch(
            kernels.backward_query, query, *launch.key_tiles(kernels.backward_query, tile.keys, key, value), *arrays,
            outputs=(jax.ShapeDtypeStruct((B, T, N, K), query.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
            programs=tiles * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * _pairs(T, C, spec) * (2 * K + V),
            ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, HAS_D_LSE=branch.d_lse is not None,
            HAS_BEFORE=before is not None, **shape,
        )  # fmt: skip

    d_query, delta = launch.fold_vmap(run)(
        query, key, value, branch.output, d_output, *or_placeholders(branch, query, before),
        intervals.key_begin, intervals.key_end,
    )  # fmt: skip
    return d_query, delta


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, delta: Array,
    intervals: Intervals, spec: Spec,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_key [B, C, H, K], d_value [B, C, H, V]); delta is what `backward_query` gives."""
    from nsa_jax.kernels import interval as kernels

    if key.shape[1] == 0:
        return jnp.zeros_like(key), jnp.zeros_like(value)
    if interval_hopper.fits(query, value, spec.scale):
        pairs = _pairs(query.shape[1], key.shape[1], spec)
        return interval_hopper.backward_key_value(
            query, key, value, d_output, branch, delta, intervals, spec.scale, pairs, spec.reach
        )
    shape = _shape(query, key, value, spec)
    tile = _pick(tiling.interval_backward_key_value, kernels.backward_key_value, shape, query.dtype)
    ahead = tiling.selected_ahead(launch.capability_of(kernels.backward_key_value))

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
            outputs=tuple(jax.ShapeDtypeStruct((splits, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * splits * H * B, warps=tile.warps, stages=tile.stages,
            flops=2 * B * N * _pairs(T, C, spec) * (2 * K + 2 * V),
            B=B, ROWS=tile.rows, KEYS=tile.keys, TILES=tiles, SPLITS=splits, AHEAD=ahead, **shape,
        )  # fmt: skip
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    statistics = interval_hopper.statistics(branch, delta)
    d_key, d_value = launch.fold_vmap(run)(
        query, key, value, d_output, *statistics, intervals.query_begin, intervals.query_end
    )
    return d_key, d_value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, query: Array, key: Array, value: Array, intervals: Intervals) -> tuple[Array, Array]:
    """(output [B, T, N, V], lse float32 [B, T, N]) of attention to the intervals, by the Triton kernels."""
    return forward(query, key, value, intervals, spec)


def _attend_forward(spec, query, key, value, intervals):
    output, lse = name_residuals(spec.branch, *forward(query, key, value, intervals, spec))
    return (output, lse), (query, key, value, intervals, output, lse)


def _attend_backward(spec, residuals, cotangents):
    query, key, value, intervals, output, lse = residuals
    d_output, d_lse = cotangents
    branch = Branch(output, lse, jnp.ones_like(lse), d_lse)
    d_query, delta = backward_query(query, key, value, d_output, branch, intervals, spec)
    return d_query, *backward_key_value(query, key, value, d_output, branch, delta, intervals, spec), None


attend.defvjp(_attend_forward, _attend_backward)
