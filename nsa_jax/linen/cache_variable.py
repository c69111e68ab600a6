"""The variable in which a linen module keeps what it has seen."""

from collections.abc import Callable

import jax
from flax import linen as nn

from nsa_jax.layers.decode import LayerState

Array = jax.Array


def cache_variable(
    module: nn.Module,
    init: Callable[[], LayerState],
    segment_ids: Array | None,
    lengths: Array | None,
    state: LayerState | None = None,
) -> tuple[nn.Variable | None, LayerState | None]:
    """(the variable, the state) of a decoding module; (None, state) for a state that is given; else Nones.

    Args:
        module: with a field `decode`.
        init: the state of a module that has seen nothing.
        segment_ids, lengths, state: arguments of the module's call.

    Raises:
        ValueError: segment_ids are given in decoding, or lengths without.
    """
    if not module.decode and state is None:
        if lengths is not None:
            raise ValueError("lengths: expected None without decode=True; negative segment_ids are padding")
        return None, None
    if segment_ids is not None:
        raise ValueError("segment_ids: expected None in decoding, where a row is one segment")
    if state is not None:
        return None, state
    is_there = module.has_variable("cache", "state")
    variable = module.variable("cache", "state", init)
    return (variable, variable.value) if is_there else (None, None)
