"""Parameters from linen modules to NNX modules and back."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from nsa_jax.layers import parameters
from nsa_jax.linen.logical_axes import LogicalAxes


def load_linen(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Gives an NNX module the parameters of the linen module of the same fields.

    Args:
        module: changed in place; its parameters' metadata stays.
        variables: {"params": ...} as `init` of the linen module gives and `apply` takes it, boxed or not. Arrays keep
            their dtype and sharding.

    Raises:
        ValueError: `variables` has other parameters or shapes than the module.
    """
    if set(variables) != {"params"}:
        raise ValueError(f"variables: expected {{'params': ...}}, got the keys {sorted(variables)}")
    given = flatten_dict(nn.unbox(dict(variables["params"])), sep="/")
    held = _parameters(module)
    parameters.match("variables", _shapes(held), _shapes(given))
    nnx.update(module, unflatten_dict(given, sep="/"))


def to_linen(module: nnx.Module) -> dict[str, Any]:
    """The parameters of an NNX module for the linen module of the same fields.

    Returns:
        {"params": ...} as `init` of the linen module gives it: parameters with names for their axes are boxed, and
        `flax.linen.unbox` takes the boxes off.
    """
    boxed = {name: _boxed(parameter) for name, parameter in _parameters(module).items()}
    return {"params": unflatten_dict(boxed, sep="/")}


def _parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named.items()}


def _boxed(parameter: nnx.Param) -> Any:
    names = parameter.get_metadata().get("out_sharding")
    return LogicalAxes(parameter.get_value(), names) if names else parameter.get_value()
