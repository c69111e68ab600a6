"""One compiled program for each call outside `jax.jit`, where JAX would otherwise compile and start every operation."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class _Static(NamedTuple):
    """What a program is compiled for, beside the shapes and dtypes of its arrays.

    Attributes:
        tree: the structure of the arguments.
        values: (type, value) of each argument that is no array, None where there is an array. The types tell 1 from
            True and 1.0, which are equal.
        compute_capability: NSA_JAX_COMPUTE_CAPABILITY, which JAX does not know of.
    """

    tree: jax.tree_util.PyTreeDef
    values: tuple[tuple[type, object] | None, ...]
    compute_capability: str | None


def one_program(function: Callable) -> Callable:
    """`function`, run as one compiled program where it is called outside `jax.jit`, and so are its derivatives.

    Arrays anywhere in the arguments, which may be pytrees, are traced. All else is static: it must be hashable, and the
    function is traced and compiled once for each value. NumPy arrays become JAX arrays, so int64 becomes int32 unless
    jax_enable_x64 is set: check or convert them first.

    Inside `jax.jit`, and whatever else traces a whole function, it is inlined when that is lowered; `vmap`, `remat` and
    its policies, `scan`, `shard_map` and `export` see what is in it. JAX keeps the trace: who changes what the function
    reads, as tests do, calls `jax.clear_caches`.
    """

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def program(static, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if value is None else value[1] for value in static.values]
        args, kwargs = jax.tree.unflatten(static.tree, leaves)
        return function(*args, **kwargs)

    program.__wrapped__.__name__ = function.__name__  # for profiles

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        values = tuple(None if ok else (type(leaf), leaf) for leaf, ok in zip(leaves, is_array, strict=True))
        arrays = [leaf for leaf, ok in zip(leaves, is_array, strict=True) if ok]
        return program(_Static(tree, values, os.environ.get("NSA_JAX_COMPUTE_CAPABILITY")), arrays)

    return call
