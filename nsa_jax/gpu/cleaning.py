"""Keys and values cleaned, and who sees those that were not finite, see `rows.sight`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.rows.intervals import Intervals
from nsa_jax.runtime import launch, transforms
from nsa_jax.runtime.partitioning import KEY, ROWS, SIGHT, UNCLEAN, partitioned

Array = jax.Array

_ROWS = 32  # keys of a program that cleans
_TOKENS, _KEYS, _FEW = 128, 1024, 32  # sizes of a program that looks at intervals, see `see`


class Cleaned(NamedTuple):
    """Keys and values in which rows that are not finite are 0.

    Attributes:
        key: [B, C, H, K]; as it was if only values are to be cleaned.
        value: [B, C, H, V].
        unclean: int8 [B, H, C], 1 where the key or its value was not finite.
    """

    key: Array
    value: Array
    unclean: Array


def clean(key: Array, value: Array, with_key: bool = True) -> Cleaned:
    """Keys [B, C, H, K] and values [B, C, H, V], cleaned in one pass over them."""
    from nsa_jax.kernels import clean as kernels

    K, V = key.shape[3], value.shape[3]

    def run(key, value):
        B, C, H = key.shape[:3]
        outputs = (
            jax.ShapeDtypeStruct(key.shape if with_key else (B, 1, 1, 1), key.dtype),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct((B, H, C), jnp.int8),
        )
        return launch.launch(
            kernels.clean,
            key,
            value,
            name="clean",
            outputs=outputs,
            programs=-(-math.prod((B, C, H)) // _ROWS),
            warps=4,
            stages=1,
            flops=0,
            SHAPE=kernels.CleanShape(
                COUNT=B * C * H,
                C=C,
                H=H,
                K=K,
                V=V,
                K_PARTS=tiling.parts(K),
                V_PARTS=tiling.parts(V),
                ROWS=_ROWS,
                WITH_KEY=with_key,
            ),
        )

    axes = [KEY if with_key else ROWS, KEY, UNCLEAN]
    clean_key, clean_value, unclean = partitioned(transforms.fold_vmap(run), (key, value), (KEY, KEY), axes)
    return Cleaned(clean_key if with_key else key, clean_value, unclean)


def of_intervals(unclean: Array, intervals: Intervals) -> Array:
    """int8 [B, Tq, H]: what queries see of their intervals; unclean: see `Cleaned`."""
    from nsa_jax.kernels import clean as kernels

    def run(key_begin, key_end, unclean):
        (B, T), (_, H, C) = key_begin.shape, unclean.shape
        shape = kernels.SeeShape(T=T, C=C, H=H, TOKENS=_TOKENS, KEYS=_KEYS, FEW=_FEW)
        return launch.launch(
            kernels.see,
            key_begin,
            key_end,
            unclean,
            name="see",
            outputs=(jax.ShapeDtypeStruct((B, T, H), jnp.int8),),
            programs=shape.TILES * H * B,
            warps=4,
            stages=1,
            flops=0,
            SHAPE=shape,
        )

    arrays = intervals.key_begin, intervals.key_end, unclean
    (seen,) = partitioned(transforms.fold_vmap(run), arrays, (ROWS, ROWS, UNCLEAN), [SIGHT])
    return seen
