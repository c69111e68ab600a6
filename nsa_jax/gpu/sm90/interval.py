"""Launches of kernels/sm90/interval.py and interval_keys.py, and when they are used: the compressed and the sliding
branch on Hopper.

The pass of the queries is the portable one: ptxas makes wrong code of one that keeps operands in registers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nsa_jax.gpu.branch import Statistics
from nsa_jax.gpu.interval import Addends, Seen, Spec
from nsa_jax.gpu.portable import interval as portable
from nsa_jax.gpu.portable.interval import backward_query
from nsa_jax.gpu.sm90 import key_pass, ring
from nsa_jax.rows.intervals import Intervals
from nsa_jax.runtime import device, launch, transforms

__all__ = ["backward_key_value", "backward_query", "forward", "supports"]

Array = jax.Array

FEWEST_SEEN = 512  # keys: if queries see fewer, beginning and ending a unit costs too much


def supports(query: Array, value: Array, scale: float) -> bool:
    """Whether these kernels do what is asked, on the device that is used."""
    from nsa_jax.kernels import interval

    (_, _, N, K), (_, _, H, V) = query.shape, value.shape
    capability = device.capability_of(interval.forward)  # 0 in Triton's interpreter, which does not know Gluon
    return scale > 0 and is_for(capability, (K, V), query.dtype.itemsize, N // H)


def is_for(capability: int, widths: Sequence[int], itemsize: int, group: int) -> bool:
    """Whether these kernels are for an architecture, widths of keys and values, and a group size."""
    fits = all(width in (64, 128) for width in widths) and group in (1, 2, 4, 8, 16, 32, 64, 128)
    return capability == 90 and itemsize == 2 and fits


def forward_stages(key_width: int, value_width: int) -> int:
    """Slots of the ring of `forward`, beside the queries of two units, for elements of two bytes."""
    from nsa_jax.kernels.sm90.interval import KEYS, UNIT

    return ring.stages(2 * KEYS.value * (key_width + value_width), beside=2 * 2 * UNIT.value * key_width)


def splits_of(programs: int, rows: int, reach: int) -> int:
    """Into how many parts query rows are cut in `backward_key_value`, so that few key tiles fill the GPU.

    Args:
        programs: key tiles of all heads and rows of the batch.
        rows: query rows of a head and row of the batch.
        reach: most queries that see one key, 0 if any number can.
    """
    if reach:
        return 1  # parts are cut from the whole row: most would hold none of a key's few queries
    return max(1, min(-(-2048 // max(programs, 1)), 64, rows // (8 * 64)))


def _sizes(query: Array, value: Array, scale: float) -> dict:
    """The fields that the shapes of both passes have."""
    (B, T, N, K), (_, C, H, V) = query.shape, value.shape
    return {"T": T, "C": C, "H": H, "G": N // H, "K": K, "V": V, "B": B, "SCALE": scale}


def forward(
    query: Array, key: Array, value: Array, seen: Seen, spec: Spec, addends: Addends | None = None
) -> tuple[Array | None, Array, Array | None]:
    """As `gpu.interval.forward`; no output where only the sum is wanted."""
    if spec.most_seen < FEWEST_SEEN:
        return portable.forward(query, key, value, seen, spec)
    from nsa_jax.kernels.sm90 import interval as kernels

    if addends is not None and value.shape[3] > query.shape[3]:
        addends = None  # the kernel puts its own output where the queries were
    keep = addends is None or addends.keep
    summed = () if addends is None else (addends.gate, *(array for pair in addends.others for array in pair))

    def run(query, key, value, key_begin, key_end, sight, *summed):
        (B, T, N, K), V = query.shape, value.shape[3]
        shape = kernels.IntervalShape(
            **_sizes(query, value, spec.scale),
            MULTIPROCESSORS=device.multiprocessors(),
            STAGES=forward_stages(K, V),
            OTHERS=len(summed) // 2,
            KEEP=keep,
        )
        whole = jax.ShapeDtypeStruct((B, T, N, V), query.dtype)
        placeholder = jax.ShapeDtypeStruct((B, 1, 1, 1), query.dtype)
        lse = jax.ShapeDtypeStruct((B, T, N), jnp.float32)
        return launch.launch(
            kernels.forward,
            launch.row_pieces(query, shape.G),
            launch.key_pieces(key),
            launch.key_pieces(value),
            key_begin,
            key_end,
            sight,
            *summed,
            *[key_begin] * (5 - len(summed)),
            name=f"{spec.branch}_forward",
            outputs=(whole if keep else placeholder, lse, whole if summed else placeholder),
            programs=shape.PROGRAMS,
            warps=4,
            stages=1,
            flops=2 * B * N * spec.pairs(T, shape.C) * (K + V),
            SHAPE=shape,
        )

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
        G, tiles = N // H, -(-C // kernels.KEYS.value)
        splits = splits_of(tiles * H * B, T * G, spec.reach)
        kind = key.dtype if splits == 1 else jnp.float32
        d_key, d_value = launch.launch(
            kernels.backward_key_value,
            launch.row_pieces(query, G),
            launch.key_pieces(key),
            launch.key_pieces(value),
            launch.row_pieces(d_output, G),
            *arrays,
            name=f"{spec.branch}_backward_key_value",
            outputs=tuple(jax.ShapeDtypeStruct((splits, B, C, H, width), kind) for width in (K, V)),
            programs=tiles * splits * H * B,
            warps=4,
            stages=1,
            registers=key_pass.REGISTERS,
            flops=2 * B * N * spec.pairs(T, C) * (2 * K + 2 * V),
            SHAPE=kernels.IntervalKeyShape(
                **_sizes(query, value, spec.scale), SPLITS=splits, STAGES=key_pass.stages(K, V)
            ),
        )
        return [jnp.sum(x, axis=0, dtype=jnp.float32).astype(key.dtype) for x in (d_key, d_value)]

    of_keys = intervals.query_begin, intervals.query_end
    d_key, d_value = transforms.fold_vmap(run)(query, key, value, d_output, *rows, *of_keys)
    return d_key, d_value
