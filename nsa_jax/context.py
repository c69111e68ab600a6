"""Attention to rows whose tokens are shared over the devices of a mesh axis (context parallelism).

Queries stay where they are. Keys and values are gathered over the axis, compressed ones first, so that the raw ones
travel while the compressed branch and selection work. Their gradients travel back in their own dtype and are summed in
float32 in the order of the devices, so that the same devices give the same bits. Nothing gathered is kept for the
backward pass, which gathers anew. Letters as in the package docstring; n devices, t = T / n tokens on each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.branches import Arrays, Config, PerBranch, Routing
from nsa_jax.checkpoint_names import CHECKPOINT_NAMES
from nsa_jax.rows.parallel import Order, Shares
from nsa_jax.runtime.transforms import vary

Array = jax.Array


class Sharing(NamedTuple):
    """What is static about rows that devices share: over which mesh axis, and in which order."""

    axis: str
    order: Order

    @classmethod
    def of(cls, axis: str, query_indices: Array | str | None) -> "Sharing":
        """By the checked arguments of an op."""
        if query_indices is None:
            return cls(axis, "contiguous")
        return cls(axis, query_indices if isinstance(query_indices, str) else "any")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Rows that the devices of a mesh axis share, from where one of them stands.

    Attributes:
        axis: the mesh axis.
        shares: how.
        device: int32 [], which of them this is.
        places: int32 [B, t], where in their rows the tokens of this device stand.
    """

    axis: str = dataclasses.field(metadata={"static": True})
    shares: Shares
    device: Array
    places: Array

    @classmethod
    def of(cls, sharing: Sharing, places: Array | None, batch: int, size: int) -> "Context":
        """The Context of rows of which this device holds `size` tokens; places: [B, t] if the order is "any"."""
        axis, order = sharing
        count, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
        if order == "any":
            places = vary(places, (axis,))
            return cls(axis, Shares.of(jax.lax.all_gather(places, axis)), device, places)
        shares = Shares(count, count * size, order)
        return cls(axis, shares, device, shares.standing(device, batch))

    def gather(self, x: Array, fill: float | int = 0) -> Array:
        """The row [B, T, ...] of x [B, t, ...]; where no token stands `fill`."""
        x = vary(x, (self.axis,))
        if jnp.issubdtype(x.dtype, jnp.integer):
            return self.shares.to_row(jax.lax.all_gather(x, self.axis), fill)
        return _gather(self.axis, fill, x, self.shares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axis: str, fill: float, x: Array, shares: Shares) -> Array:
    return shares.to_row(jax.lax.all_gather(x, axis), fill)


def _gather_forward(axis, fill, x, shares):
    return _gather(axis, fill, x, shares), shares


def _gather_backward(axis, fill, shares, cotangent):
    # a reduce-scatter that adds in float32, at half the bytes of one that sends float32
    parts = jax.lax.all_to_all(shares.from_row(cotangent), axis, split_axis=0, concat_axis=0, tiled=True)
    return parts.sum(axis=0, dtype=jnp.float32).astype(cotangent.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


def attend(
    op: Callable, sharing: Sharing, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing
) -> Array:
    """`native_sparse_attention` of checked arguments, of this device's tokens: [B, t, N, V].

    Args:
        op: of config, arrays, gates and routing, whose keys are whole rows.
        sharing: over which axis, and how.
        config: of the op.
        arrays: of this device's tokens; compressed arrays, if any, are of whole rows.
        gates, routing: of this device's tokens.
    """
    query, key, value, *compressed = arrays
    context = Context.of(sharing, routing.query_indices, *query.shape[:2])
    segment_ids = routing.segment_ids
    if segment_ids is not None:
        segment_ids = context.gather(segment_ids, fill=-1)
    routing = routing._replace(segment_ids=segment_ids, query_indices=context.places)

    def attend_heads(query, key, value, compressed, gates, routing):
        key, value = (context.gather(x, fill=jnp.nan) for x in (key, value))
        return op(config, Arrays(query, key, value, *compressed), gates, routing)

    policy = jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)
    attend_heads = jax.checkpoint(attend_heads, policy=policy)
    return attend_heads(query, key, value, compressed, gates, routing)
