"""Which devices hold what of a run: rows of a batch, parameters and optimiser, by logical axis rules."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nsa_jax.linen import TransformerConfig

#: The axes of a run's mesh. data: rows. fsdp: rows, and parameters and optimiser with them. tensor: heads and MLP.
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

#: Logical axes, of parameters (see `linen.logical_axes`) and of activations, to axes of the mesh.
RULES = (
    ("batch", ROWS),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    *((name, None) for name in ("layers", "vocab", "kv", "branches", "window", "window_kv")),
)


def parse_mesh(text: str) -> dict[str, int]:
    """The size of each axis of AXES, 1 for those that "data=2,fsdp=2" does not name.

    Raises:
        ValueError: it is not of this form, or names an axis that is none or that was named.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not (equals and number.isascii() and number.isdigit() and int(number)):
            raise ValueError(
                f"mesh: expected {', '.join(AXES)}, each at most once and with a positive number, such as"
                f" data=2,fsdp=2, got {text!r}"
            )
        sizes[name] = int(number)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(devices: Sequence[jax.Device], sizes: dict[str, int] | None = None) -> Mesh:
    """A mesh of all these devices with the axes AXES, all of them along "data" unless sizes are given.

    Raises:
        ValueError: the sizes are not of so many devices.
    """
    sizes = dict.fromkeys(AXES, 1) | ({"data": len(devices)} if sizes is None else sizes)
    shape = tuple(sizes[name] for name in AXES)
    if math.prod(shape) != len(devices):
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh: expected axes of {len(devices)} devices together, got {asked}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=list(devices))


def row_shares(mesh: Mesh) -> int:
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[name] for name in ROWS)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, ...]."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def check_divides(config: TransformerConfig, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError for sizes that the mesh does not divide."""
    wanted = (
        ("batch_size", batch_size, row_shares(mesh), "data and fsdp"),
        ("hidden_size", config.hidden_size, mesh.shape["fsdp"], "fsdp"),
        ("num_heads", config.num_heads, mesh.shape["tensor"], "tensor"),
        ("num_kv_heads", config.num_kv_heads, mesh.shape["tensor"], "tensor"),
        ("mlp_size", config.swiglu_size, mesh.shape["tensor"], "tensor"),
    )
    for name, size, devices, axes in wanted:
        if size % devices:
            raise ValueError(f"{name}: expected a multiple of the {devices} devices of {axes}, got {size}")


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The shardings of parameters, from abstract ones in their boxes."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def like_params(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """The shardings of a tree in which there are trees of the form of the parameters, and else what all devices hold.

    Args:
        tree: optax's state.
        shardings: those of the parameters.
        mesh: of the shardings.
    """
    by_path = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
    same = NamedSharding(mesh, PartitionSpec())

    def of_leaf(path, _):
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), same)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def put(rows: Sequence[Any], mesh: Mesh) -> tuple[jax.Array, ...]:
    """Arrays [B, T] on the mesh, rows over its devices; of each a process touches the rows of its own devices."""
    sharding = rows_sharding(mesh)
    return tuple(jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for x in rows)
