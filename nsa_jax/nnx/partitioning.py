"""Logical axis names as metadata of NNX parameters."""

from typing import Any

import jax
from flax.core import spmd

from nsa_jax.linen.logical_axes import LogicalAxes


def axis_names(*names: str) -> dict[str, Any]:
    """Metadata of an `nnx.Param` whose axes have these logical names.

    A parameter is placed when it is made only inside a mesh (`jax.set_mesh`) and `nnx.logical_axis_rules`, which then
    must have a rule for each name; a name alone says nothing of a mesh. `nnx.bridge.ToLinen` boxes it as linen does.
    """
    placed = bool(spmd.get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
    return {"out_sharding": names, "eager_sharding": placed, "linen_meta_type": LogicalAxes}
