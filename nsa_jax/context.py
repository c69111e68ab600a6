"""Rows whose tokens are shared over the devices of a mesh axis (context parallelism): what travels between devices.

Gradients of what is gathered travel back in their own dtype and are summed in float32 in the order of the devices, so
that the same devices give the same bits. Letters as in the package docstring; n devices, t = T / n tokens on each.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.rows.parallel import Order, Shares
from nsa_jax.rows.segments import Layout, layout
from nsa_jax.runtime.transforms import vary, vary_together

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

    def gather(self, x: Array, *, fill: float | int = 0, shares: Shares | None = None) -> Array:
        """The row [B, T, ...] of x [B, t, ...]; where no token stands `fill`. shares: unless they are the tokens'."""
        x, shares = vary(x, (self.axis,)), shares or self.shares
        if jnp.issubdtype(x.dtype, jnp.integer):
            return shares.to_row(jax.lax.all_gather(x, self.axis), fill)
        return _gather(self.axis, fill, *vary_together((x, shares)))

    def row_ids(self, segment_ids: Array | None) -> Array | None:
        """The segment ids of whole rows, int32 [B, T], of those of this device's tokens."""
        return None if segment_ids is None else self.gather(segment_ids, fill=-1)

    def rows(self, row_ids: Array | None) -> Layout:
        """Where the tokens of whole rows stand in their segments."""
        return layout(row_ids, self.places.shape[0], self.shares.length)

    def tokens(self, row_ids: Array | None) -> Layout:
        """Where this device's tokens stand in their segments; row_ids: of whole rows."""
        places = jnp.clip(self.places, 0, self.shares.length - 1)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), self.rows(row_ids))

    def followed(self, x: Array, size: int) -> list[Array]:
        """The pieces of x [B, t, ...], each with the `size` entries that follow it in the row, 0 behind the row's end.

        The order is known, and pieces have no fewer entries than that.
        """
        pieces = jnp.split(vary(x, (self.axis,)), self.shares.pieces, axis=1)
        if size == 0:
            return pieces
        heads = [piece[:, :size] for piece in pieces]
        last, one_on = self.shares.count - 1, [(i, i + 1) for i in range(self.shares.count - 1)]
        after = [jax.lax.ppermute(heads[0], self.axis, [(i, j) for j, i in one_on])]
        if self.shares.order == "zigzag":
            after[0] = jnp.where(self.device == last, heads[1], after[0])  # the row turns around on the last device
            after.append(jax.lax.ppermute(heads[1], self.axis, one_on))
        return [jnp.concatenate(both, axis=1) for both in zip(pieces, after, strict=True)]

    def preceded(self, x: Array, size: int) -> Array:
        """x [B, t, ...] behind the `size` entries before it, 0 before the row's begin; of contiguous shares."""
        x = vary(x, (self.axis,))
        if size == 0:
            return x
        one_on = [(i, i + 1) for i in range(self.shares.count - 1)]
        return jnp.concatenate([jax.lax.ppermute(x[:, -size:], self.axis, one_on), x], axis=1)


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
