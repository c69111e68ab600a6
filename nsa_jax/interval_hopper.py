"""Starts kernels/sm90/interval.py and interval_keys.py: compressed and sliding branch on Hopper GPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import launch, tiling
from nsa_jax.residuals import Branch
from nsa_jax.segments import Intervals

Array = jax.Array


class Addends(NamedTuple):
    """What is to be added up where a branch's output is at hand.

    Attributes:
        gate: [B, T, N], of the branch itself.
        others: (output [B, T, N, V], gate [B, T, N]) of one or two other branches.
        keep: whether the branch's own output is wanted, too.
    """

    gate: Array
    others: tuple[tuple[Array, Array], ...]
    keep: bool


def fits(query: Array, value: Array, scale: float) -> bool:
    """Whether these kernels do what is asked, on the device that is used."""
    from nsa_jax.kernels import interval

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = launch.capability_of(interval.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return scale > 0 and tiling.interval_hopper(capability, (K, V), query.dtype.itemsize, N // H)


def _shape(query: Array, value: Array, scale: float) -> dict:
    (B, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "B": B, "SCALE": scale}


def sight(intervals: Intervals, heads: int) -> Array:
    """What each query sees, int8 [B, T, H]: 0 nothing, 1 what is finite, 2 also what is not."""
    seen = intervals.key_end > intervals.key_begin
    return jnp.broadcast_to(seen[..., None], (*seen.shape, heads)).astype(jnp.int8)


def statistics(branch: Branch, delta: Array) -> tuple[Array, Array, Array]:
    """(lse, delta, weight) [B, T, N] as passes from the keys' side take them: rows that see nothing, or are not
    finite, do not count."""
    live = jnp.isfinite(branch.lse)
    return jnp.where(live, branch.lse, jnp.inf), jnp.where(live, delta, 0.0), jnp.where(live, branch.weight, 0.0)


def fits_sum(query: Array, value: Array) -> bool:
    """Whether `forward`, where it fits, adds up gated outputs too: it puts its own where the queries were."""
    return value.shape[3] <= query.shape[3]


def forward(
    query: Array, key: Array, value: Array, intervals: Intervals, scale: float, pairs: int,
    addends: Addends | None = None,
) -> tuple[Array | None, Array, Array | None]:  # fmt: skip
    """(output [B, T, N, V], lse float32 [B, T, N]), as `interval.forward` gives them, and the sum of the addends.

    pairs: about how many (query, key) pairs a head computes, for profiles.
    """
    from nsa_jax.kernels.sm90 import interval as kernels

    keep = addends is None or addends.keep
    summed = () if addends is None else (addends.gate, *(array for pair in addends.others for array in pair))

    def run(query, key, value, key_begin, key_end, sight, *summed):
        (B, T, N, K), V = query.shape, value.shape[3]
        shape = _shape(query, value, scale)
        tiles = -(-T * shape["G"] // tiling.INTERVAL_HOPPER_ROWS)
        programs = min(tiles * shape["H"] * B, launch.multiprocessors())  # one fits on each
        whole = jax.ShapeDtypeStruct((B, T, N, V), query.dtype)
        placeholder = jax.ShapeDtypeStruct((B, 1, 1, 1), query.dtype)
        return launch.launch(
            kernels.forward, launch.row_pieces(query, shape["G"]), launch.key_pieces(key), launch.key_pieces(value),
            key_begin, key_end, sight, *summed, *[key_begin] * (5 - len(summed)),
            outputs=(
                whole if keep else placeholder,
                jax.ShapeDtypeStruct((B, T, N), jnp.float32),
                whole if summed else placeholder,
            ),
            programs=programs, warps=4, stages=1, flops=2 * B * N * pairs * (K + V),
            OTHERS=len(summed) // 2, KEEP=keep, TILES=tiles, PROGRAMS=programs,
            STAGES=tiling.interval_hopper_stages(K, V), **shape,
        )  # fmt: skip

    seen = intervals.key_begin, intervals.key_end, sight(intervals, key.shape[2])
    output, lse, total = launch.fold_vmap(run)(query, key, value, *seen, *summed)
    return output if keep else None, lse, total if summed else None


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, branch: Branch, delta: Array, intervals: Intervals,
    scale: float, pairs: int, reach: int,
) -> tuple[Array, Array]:  # fmt: skip
    """(d_key [B, C, H, K], d_value [B, C, H, V]), as `interval.backward_key_value` gives them.

    reach: most queries that see one key, 0 if any number can.
    """
    from nsa_jax.kernels.sm90 import interval_keys as kernels

    def run(query, key, value, d_output, *arrays):
        (B, T, N, K), (_, C, H, V) = query.shape, value.shape
        shape = _shape(query, value, scale)
        tiles = -(-C // tiling.HOPPER_KEYS)
        shares = tiling.interval_hopper_shares(tiles * H * B, T * shape["G"], reach)
        kind = key.dtype if shares == 1 else jnp.float32
        d_key, d_value = launch.launch(
            kernels.backward_key_value, launch.row_pieces(query, shape["G"]), launch.key_pieces(key),
            launch.key_pieces(value), launch.row_pieces(d_output, shape["G"]), *arrays,
            outputs=tuple(jax.ShapeDtypeStruct((shares, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * shares * H * B, warps=4, stages=1, registers=tiling.HOPPER_KEYS_REGISTERS,
            flops=2 * B * N * pairs * (2 * K + 2 * V),
            TILES=tiles, SPLITS=shares, STAGES=tiling.hopper_keys_stages(K, V), **shape,
        )  # fmt: skip
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    d_key, d_value = launch.fold_vmap(run)(
        query, key, value, d_output, *statistics(branch, delta), intervals.query_begin, intervals.query_end
    )
    return d_key, d_value
