"""Rows whose tokens are shared over devices: who holds which tokens, and how the shares make up the row.

Letters as in the package docstring, and n devices, each of which holds T / n tokens of every row.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import checks
from nsa_jax.rows.windows import scatter

Array = jax.Array

Order = Literal["contiguous", "zigzag", "any"]


def zigzag_indices(length: int, shares: int) -> np.ndarray:
    """The order of a row's tokens whose equal shares have equal causal work.

    The row is cut into 2 * shares pieces. Share i, the i-th run of length // shares entries, is piece i and then piece
    2 * shares - 1 - i: `x[:, zigzag_indices(length, shares)]`, sharded over tokens, gives each device its share.

    Args:
        length: T, the tokens of a row, a multiple of 2 * shares.
        shares: devices that share a row.

    Returns:
        int32 [length], a NumPy array: where in the row each token stands.

    Raises:
        TypeError: length or shares is not an int.
        ValueError: length or shares is not positive, or length is not a multiple of 2 * shares.
    """
    shares = checks.integer("shares", shares, 1)
    length = checks.integer("length", length, 1, checks.MOST_INT)
    checks.pieces("length", length, 2 * shares, "tokens, two pieces for each share")
    pieces = np.arange(length, dtype=np.int32).reshape(2 * shares, length // (2 * shares))
    return np.stack([pieces[:shares], pieces[: shares - 1 : -1]], axis=1).reshape(length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shares:
    """How rows of T tokens are shared over n devices; parts are arrays [n, B, T / n, ...], one share after the other.

    Attributes:
        count: n.
        length: T.
        order: "contiguous" (share i is the i-th of n pieces), "zigzag" (see `zigzag_indices`), or "any".
        places: int32 [n, B, T / n], where in its row each token stands, outside of it for padding; None unless "any".
        sources: int32 [B, T], which of the n * T / n tokens of a row's shares stands there, -1 for none; likewise.
    """

    count: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    order: Order = dataclasses.field(metadata={"static": True})
    places: Array | None = None
    sources: Array | None = None

    @classmethod
    def of(cls, places: Array) -> "Shares":
        """The Shares of tokens that stand at `places`, int32 [n, B, T / n], each place of a row at most once."""
        count, batch, part = places.shape
        length = count * part
        flat = places.swapaxes(0, 1).reshape(batch, length)
        arrival = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 1)
        inside = (flat >= 0) & (flat < length)
        return cls(count, length, "any", places, scatter(flat, arrival, inside, length, -1))

    @property
    def pieces(self) -> int:
        """Runs of T / n / pieces neighbours that each share consists of; 0 if unknown."""
        return {"contiguous": 1, "zigzag": 2, "any": 0}[self.order]

    def piece_numbers(self, device: Array) -> list[Array]:
        """Which pieces of the row the device holds, of `pieces * count`; an ascending int32 [] each."""
        return [device, 2 * self.count - 1 - device][: self.pieces]

    def standing(self, device: Array, batch: int) -> Array:
        """int32 [B, T / n], where the tokens of the device's share stand."""
        if self.places is not None:
            return self.places[device]
        size = self.length // (self.count * self.pieces)
        index = jnp.arange(size, dtype=jnp.int32)
        places = jnp.concatenate([number * size + index for number in self.piece_numbers(device)])
        return jnp.broadcast_to(places[None], (batch, places.size))

    def to_row(self, parts: Array, fill: float | int = 0) -> Array:
        """parts [n, B, t, ...] in row order, [B, n * t, ...]; where no token stands `fill`.

        Unless the order is "any" there may be other things than tokens, as many in every piece.
        """
        count, batch, size, *rest = parts.shape
        if self.order == "any":
            row = jnp.arange(batch, dtype=jnp.int32)[:, None]
            index = (self.sources // size * batch + row) * size + self.sources % size
            index = jnp.where(self.sources >= 0, index, parts.size)  # past the end
            flat = parts.reshape(count * batch * size, *rest)
            return jnp.take(flat, index, axis=0, mode="fill", fill_value=fill, unique_indices=True)
        if self.order == "zigzag":
            halves = parts.reshape(count, batch, 2, size // 2, *rest)
            parts = jnp.concatenate([halves[:, :, 0], halves[::-1, :, 1]])
        return jnp.moveaxis(parts, 0, 1).reshape(batch, count * size, *rest)

    def from_row(self, row: Array) -> Array:
        """row [B, n * t, ...] as parts [n, B, t, ...], the inverse of `to_row`; 0 for padding."""
        batch, length, *rest = row.shape
        size = length // self.count
        if self.order == "any":
            inside = (self.places >= 0) & (self.places < length)
            index = self.places + jnp.arange(batch, dtype=jnp.int32)[None, :, None] * length
            flat = row.reshape(batch * length, *rest)
            index = jnp.where(inside, index, batch * length)
            return jnp.take(flat, index, axis=0, mode="fill", fill_value=0)
        pieces = jnp.moveaxis(row.reshape(batch, self.count * self.pieces, -1, *rest), 1, 0)
        if self.order == "zigzag":
            pieces = jnp.stack([pieces[: self.count], pieces[: self.count - 1 : -1]], axis=2)
        return pieces.reshape(self.count, batch, size, *rest)
