"""Launches of kernels/sm90/interval.py and interval_keys.py: the compressed and the sliding branch on Hopper.

The pass of the queries is the portable one: ptxas makes wrong code of one that keeps operands in registers.
"""

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.gpu.branch import Statistics
from nsa_jax.gpu.interval import Addends, Seen, Spec
from nsa_jax.gpu.portable import interval as portable
from nsa_jax.gpu.portable.interval import backward_query
from nsa_jax.rows.intervals import Intervals
from nsa_jax.runtime import device, launch, transforms

__all__ = ["backward_key_value", "backward_query", "forward", "supports"]

Array = jax.Array


def supports(query: Array, value: Array, scale: float) -> bool:
    """Whether these kernels do what is asked, on the device that is used."""
    from nsa_jax.kernels import interval

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = device.capability_of(interval.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return scale > 0 and tiling.interval_hopper(capability, (K, V), query.dtype.itemsize, N // H)


def _shape(query: Array, value: Array, scale: float) -> dict:
    (B, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "B": B, "SCALE": scale}


def forward(
    query: Array, key: Array, value: Array, seen: Seen, spec: Spec, addends: Addends | None = None
) -> tuple[Array | None, Array, Array | None]:
    """As `gpu.interval.forward`; no output where only the sum is wanted."""
    if spec.most_seen < tiling.INTERVAL_HOPPER_KEYS:
        return portable.forward(query, key, value, seen, spec)
    from nsa_jax.kernels.sm90 import interval as kernels

    if addends is not None and value.shape[3] > query.shape[3]:
        addends = None  # the kernel puts its own output where the queries were
    keep = addends is None or addends.keep
    summed = () if addends is None else (addends.gate, *(array for pair in addends.others for array in pair))

    def run(query, key, value, key_begin, key_end, sight, *summed):
        (B, T, N, K), V = query.shape, value.shape[3]
        shape = _shape(query, value, spec.scale)
        tiles = -(-T * shape["G"] // tiling.INTERVAL_HOPPER_ROWS)
        programs = min(tiles * shape["H"] * B, device.multiprocessors())  # one fits on each
        whole = jax.ShapeDtypeStruct((B, T, N, V), query.dtype)
        placeholder = jax.ShapeDtypeStruct((B, 1, 1, 1), query.dtype)
        return launch.launch(
            kernels.forward, launch.row_pieces(query, shape["G"]), launch.key_pieces(key), launch.key_pieces(value),
            key_begin, key_end, sight, *summed, *[key_begin] * (5 - len(summed)),
            name=f"{spec.branch}_forward",
            outputs=(
                whole if keep else placeholder,
                jax.ShapeDtypeStruct((B, T, N), jnp.float32),
                whole if summed else placeholder,
            ),
            programs=programs, warps=4, stages=1, flops=2 * B * N * spec.pairs(T, key.shape[1]) * (K + V),
            OTHERS=len(summed) // 2, KEEP=keep, TILES=tiles, PROGRAMS=programs,
            STAGES=tiling.interval_hopper_stages(K, V), **shape,
        )  # fmt: skip

    intervals = seen.intervals
    output, lse, total = transforms.fold_vmap(run)(
        query, key, value, intervals.key_begin, intervals.key_end, seen.sight, *summed
    )
    return output if keep else None, lse, total if summed else None


def backward_key_value(
    query: Array, key: Array, value: Array, d_output: Array, rows: Statistics, intervals: Intervals, spec: Spec
) -> tuple[Array, Array]:
    """(d_key [B, C, H, K], d_value [B, C, H, V]) of queries in the order of their places."""
    from nsa_jax.kernels.sm90 import interval_keys as kernels

    def run(query, key, value, d_output, *arrays):
        (B, T, N, K), (_, C, H, V) = query.shape, value.shape
        shape = _shape(query, value, spec.scale)
        tiles = -(-C // tiling.HOPPER_KEYS)
        splits = tiling.interval_hopper_shares(tiles * H * B, T * shape["G"], spec.reach)
        kind = key.dtype if splits == 1 else jnp.float32
        d_key, d_value = launch.launch(
            kernels.backward_key_value, launch.row_pieces(query, shape["G"]), launch.key_pieces(key),
            launch.key_pieces(value), launch.row_pieces(d_output, shape["G"]), *arrays,
            name=f"{spec.branch}_backward_key_value",
            outputs=tuple(jax.ShapeDtypeStruct((splits, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * splits * H * B, warps=4, stages=1, registers=tiling.HOPPER_KEYS_REGISTERS,
            flops=2 * B * N * spec.pairs(T, key.shape[1]) * (2 * K + 2 * V),
            TILES=tiles, SPLITS=splits, STAGES=tiling.hopper_keys_stages(K, V), **shape,
        )  # fmt: skip
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    d_key, d_value = transforms.fold_vmap(run)(
        query, key, value, d_output, *rows, intervals.query_begin, intervals.query_end
    )
    return d_key, d_value
