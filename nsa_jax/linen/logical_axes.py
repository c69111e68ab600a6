"""Parameters with logical axis names, in Linen and, through `flax.nnx.bridge`, in NNX."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


class LogicalAxes(nn.LogicallyPartitioned):
    """A parameter with names for its axes, which say nothing of a mesh until rules map them to one.

    `nnx.bridge.ToNNX` keeps the names as metadata and, as in Linen, places no array by them.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The array, put where rules say, but for the flat kernel that `nn.DenseGeneral` initialises."""
        return super().unbox(apply_constraint and self.value.ndim == len(self.names))

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The metadata of an `nnx.Variable`."""
        return {
            "value": self.value,
            "out_sharding": self.names,
            "sharding_rules": self.rules,
            "mesh": self.mesh,
            "eager_sharding": False,
        }

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "LogicalAxes":
        """The box of an `nnx.Variable`'s value, by its metadata."""
        rules, mesh = metadata.get("sharding_rules"), metadata.get("mesh")
        return cls(metadata["value"], metadata["out_sharding"], mesh=mesh, rules=rules)


def with_logical_axes(init: Callable, names: tuple[str, ...]) -> Callable:
    """The initialiser, its result boxed with the names of its axes."""

    def boxed(*arguments, **options):
        return LogicalAxes(init(*arguments, **options), names)

    return boxed
