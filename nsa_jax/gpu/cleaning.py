"""Keys and values cleaned by a kernel: one pass over them, where XLA would take two."""

import math

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.rows.sight import Cleaned, count_before
from nsa_jax.runtime import launch, transforms

Array = jax.Array

_ROWS = 32  # of a program


def clean(key: Array, value: Array) -> Cleaned:
    """Keys [B, C, H, K] and values [B, C, H, V], cleaned: see `Cleaned`."""
    from nsa_jax.kernels import clean as kernels

    K, V = key.shape[3], value.shape[3]

    def run(key, value):
        rows = key.shape[:3]
        return launch.launch(
            kernels.clean,
            key,
            value,
            name="clean",
            outputs=[
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)),
                jax.ShapeDtypeStruct(rows, jnp.int32),
            ],
            programs=-(-math.prod(rows) // _ROWS),
            warps=4,
            stages=1,
            flops=0,
            COUNT=math.prod(rows),
            K=K,
            V=V,
            ROWS=_ROWS,
            K_PARTS=tiling.parts(K),
            V_PARTS=tiling.parts(V),
        )

    key, value, unclean = transforms.fold_vmap(run)(key, value)
    return Cleaned(key, value, count_before(unclean))
