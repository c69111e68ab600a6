"""What JAX's transformations need of a function that launches kernels: varying axes for shard_map, a rule for vmap."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def varying_axes(arrays) -> tuple[str, ...]:
    """The mesh axes of an enclosing shard_map over which any array of a pytree varies."""
    axes = set()
    for array in jax.tree.leaves(arrays):
        axes |= jax.typeof(array).manual_axis_type.varying
    return tuple(sorted(axes))


def vary_together(arrays):
    """A pytree of arrays, each varying over every mesh axis that one of them varies over (shard_map's check_vma).

    A custom_vjp must see its arguments so: the cotangents it gives then vary like them, and JAX sums them where needed.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda array: vary(array, axes), arrays)


def vary(array: Array, axes: tuple[str, ...]) -> Array:
    """The array, varying over these mesh axes too."""
    lacking = tuple(axis for axis in axes if axis not in jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, lacking, to="varying") if lacking else array


def fold_vmap(function: Callable) -> Callable:
    """`function` of arrays [B, ...], giving arrays [B, ...], under jax.vmap: the mapped axis is folded into B."""

    @jax.custom_batching.custom_vmap
    def folded(*arrays):
        return function(*arrays)

    @folded.def_vmap
    def rule(axis_size, in_batched, *arrays):
        def merge(array, batched):
            array = array if batched else jnp.broadcast_to(array[None], (axis_size, *array.shape))
            return array.reshape(axis_size * array.shape[1], *array.shape[2:])

        outputs = folded(*map(merge, arrays, in_batched))
        split = jax.tree.map(lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]), outputs)
        return split, jax.tree.map(lambda _: True, outputs)

    return folded
