"""Compression windows of rows that devices share: one device makes each window, and all gather what was made.

In a known order a window is made where its first token is, from that device's tokens and the few that follow them on
another one. In any other order the devices gather the row and make equal shares of its windows. Letters as in
`context`.
"""

import functools

import jax
import jax.numpy as jnp

from nsa_jax.compression import compress, take_windows
from nsa_jax.context import Context
from nsa_jax.rows.parallel import Shares
from nsa_jax.rows.segments import layout, search
from nsa_jax.rows.windows import window_starts
from nsa_jax.runtime.transforms import vary, vary_together

Array = jax.Array


class Windows:
    """The windows of shared rows, and which of them this device makes: at most W.

    Attributes:
        local: whether they are made where their tokens are; otherwise x is gathered to make them.
        places: int32 [B, W], where in the row the windows that this device makes begin, -1 for none.
    """

    def __init__(self, context: Context, segment_ids: Array | None, batch: int, window: int, stride: int):
        """segment_ids: int32 [B, T], of whole rows."""
        shares = context.shares
        self.context, self.window, self.stride = context, window, stride
        self.packed, self.slots = segment_ids is not None, shares.length // stride
        starts = window_starts(layout(segment_ids, batch, shares.length), window, stride)  # [B, C]
        starts = jnp.pad(starts, ((0, 0), (0, max(0, 1 - self.slots))), constant_values=-1)
        self.starts = vary(starts, (context.axis,))
        piece = shares.length // (shares.count * shares.pieces) if shares.pieces else 0
        self.local = piece >= window
        if self.local:
            self._piece, self._most = piece, -(-piece // stride)
            begins = jnp.where(self.starts >= 0, self.starts, shares.length)
            edges = piece * jnp.arange(shares.count * shares.pieces + 1, dtype=jnp.int32)
            # [B, n * pieces + 1], which slot holds the first window that begins in a piece
            self._first = jax.vmap(lambda begins: search(begins, edges, "left"))(begins)
            numbers = shares.piece_numbers(context.device)
            self._places = [self._of_slots(self._first[:, i], self._first[:, i + 1], self._most) for i in numbers]
            self._begins = [jnp.where(at >= 0, at - i * piece, -1) for at, i in zip(self._places, numbers, strict=True)]
        else:
            most = max(1, -(-self.slots // shares.count))
            first = jnp.broadcast_to(context.device * most, (batch,))
            self._places = [self._of_slots(first, jnp.minimum(first + most, self.slots), most)]
        self.places = jnp.concatenate(self._places, axis=1)

    def _of_slots(self, first: Array, end: Array, most: int) -> Array:
        """int32 [B, most]: the starts of the slots from first to end, int32 [B], -1 behind them."""
        slot = first[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        start = jnp.take_along_axis(self.starts, jnp.minimum(slot, self.starts.shape[1] - 1), axis=1)
        return jnp.where(slot < end[:, None], start, -1)

    def take(self, x: Array) -> Array:
        """The tokens [B, W, l, H, D] of the windows that this device makes; x: [B, t, H, D], of its tokens."""
        if not self.local:
            return take_windows(self.context.gather(x), self.places, self.window, self.stride)
        pieces = self.context.followed(x, self.window - 1)
        windows = [
            take_windows(piece, begins, self.window, self.stride)
            for piece, begins in zip(pieces, self._begins, strict=True)
        ]
        return jnp.concatenate(windows, axis=1)

    def mean(self, x: Array) -> Array:
        """The means [B, W, H, D] of the windows that this device makes; x: [B, t, H, D], of its tokens."""
        if not self._aligned:
            return self.take(x.astype(jnp.float32)).mean(axis=2).astype(x.dtype)
        pieces = self.context.followed(x, self.window - self.stride)
        means = [compress(piece, window=self.window, stride=self.stride)[:, : self._most] for piece in pieces]
        return jnp.concatenate(means, axis=1)

    @property
    def _aligned(self) -> bool:
        """Whether windows begin at the same tokens of all pieces."""
        return self.local and not self.packed and self._piece % self.stride == 0

    def gather(self, x: Array) -> Array:
        """The slots [B, C, H, D] of all windows; x: [B, W, H, D], of those that this device makes."""
        if not self.local:
            shares = Shares(self.context.shares.count, self.context.shares.count * x.shape[1], "contiguous")
            return self.context.gather(x, shares=shares)[:, : self.slots]
        made = self.context.gather(x)  # [B, n * pieces * most, ...]
        if self._aligned:
            return made
        slot = jnp.arange(self.slots, dtype=jnp.int32)[None]
        piece = jnp.maximum(self.starts, 0) // self._piece
        index = piece * self._most + slot - jnp.take_along_axis(self._first, piece, axis=1)
        index = jnp.where(self.starts >= 0, index, made.shape[1])
        number = jnp.arange(self._most, dtype=jnp.int32)[None, None]
        inverse = self._first[:, :-1, None] + number  # [B, n * pieces, most]
        inverse = jnp.where(inverse < self._first[:, 1:, None], inverse, self.slots).reshape(made.shape[:2])
        return _permute(*vary_together((made, index, inverse)))


@jax.custom_vjp
def _permute(x: Array, index: Array, inverse: Array) -> Array:
    """x [B, X, ...] at index, int32 [B, Y], 0 where that is outside; inverse: int32 [B, X], likewise the way back."""
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
    return jax.vmap(take)(x, index)


_permute.defvjp(
    lambda x, index, inverse: (_permute(x, index, inverse), (index, inverse)),
    lambda ways, cotangent: (_permute(cotangent, *ways[::-1]), None, None),
)
