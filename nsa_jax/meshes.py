"""Meshes with explicit axes, which `jax.make_mesh` makes unless told otherwise."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = jax.Array


def partitioned(function: Callable, arrays: tuple, specs: Callable):
    """function(*arrays), computed by the partitioner where the arrays' mesh has explicit axes.

    Args:
        function: of arrays, or None.
        arrays: what it gets.
        specs: of the mesh axes that the axes of each array are sharded over (see `axes_of`; None for None) to a
            PartitionSpec per result.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return function(*arrays)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(*(None if x is None else axes_of(x) for x in arrays)),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arrays)


def partitioned_attention(function: Callable, arrays: tuple, return_residual: bool):
    """As `partitioned`, for a function of a query and more to output and lse: both, or the output alone."""
    output, lse = partitioned(function, arrays, attention_specs)
    return (output, lse) if return_residual else output


def attention_specs(query, *_) -> tuple[PartitionSpec, PartitionSpec]:
    """PartitionSpecs of output [B, Tq, N, V] and lse [B, Tq, N] by the axes of the query."""
    return PartitionSpec(*query[:3], None), PartitionSpec(*query[:3])


def axes_of(x: Array) -> tuple:
    """The mesh axes that each axis of x is sharded over, None for none."""
    spec = jax.typeof(x).sharding.spec
    return (*spec, *(None,) * (x.ndim - len(spec)))


def _explicit_mesh(arrays):
    for x in jax.tree.leaves(arrays):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None
