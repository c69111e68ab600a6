"""Compression windows of keys and values, and their default map, the mean.

No gradient here is a scatter-add, whose order, and so whose bits, XLA leaves open on a GPU. Letters as in the package
docstring; C = T // stride window slots. Source: Yuan et al. 2025, arXiv 2502.11089, equation 7.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nsa_jax import checks, meshes
from nsa_jax.rows.segments import layout, search
from nsa_jax.rows.windows import window_starts
from nsa_jax.runtime.eager import one_program
from nsa_jax.runtime.transforms import vary_together

Array = jax.Array


def compress(x: Array, *, window: int, stride: int, segment_ids: Array | None = None) -> Array:
    """The mean over each complete window, computed in float32.

    Args:
        x: [B, T, H, D], keys or values.
        window: tokens in a window.
        stride: tokens from the start of one window to the start of the next; divides window.
        segment_ids: integers [B, T]; windows start at each segment's first token, negative ids are padding. None is one
            segment per row.

    Returns:
        [B, T // stride, H, D] in x's dtype: the windows in row order, then zeros in the empty slots.

    Raises:
        TypeError: window or stride is not an int, or segment_ids not of an integer dtype.
        ValueError: a shape, window or stride is not as above.
    """
    window, stride, segment_ids = _checked(x, window, stride, segment_ids)
    pool = functools.partial(_compress, window, stride)
    return meshes.partitioned(pool, (x, segment_ids), lambda x, *_: PartitionSpec(x[0], None, *x[2:]))


@one_program
def _compress(window: int, stride: int, x: Array, segment_ids: Array | None) -> Array:
    batch, length, heads, width = x.shape
    if length < window:
        return jnp.zeros((batch, length // stride, heads, width), x.dtype)
    if segment_ids is not None:
        return _gather_windows(window, stride, x.astype(jnp.float32), segment_ids).mean(axis=2).astype(x.dtype)
    slots = length // stride
    parts = x[:, : slots * stride].reshape(batch, slots, stride, heads, width).sum(axis=2, dtype=jnp.float32)
    total = sum(_shifted(parts, window // stride))
    return _fill(total / window, slots).astype(x.dtype)


def gather_windows(x: Array, *, window: int, stride: int, segment_ids: Array | None = None) -> Array:
    """The tokens of each complete window: what a learned compression map starts from.

    Args:
        x: [B, T, H, D], keys or values.
        window: tokens in a window.
        stride: tokens from the start of one window to the start of the next; divides window.
        segment_ids: integers [B, T]; windows start at each segment's first token, negative ids are padding. None is one
            segment per row.

    Returns:
        [B, T // stride, window, H, D] in x's dtype: the windows in row order, then zeros in the empty slots.

    Raises:
        TypeError: window or stride is not an int, or segment_ids not of an integer dtype.
        ValueError: a shape, window or stride is not as above.
    """
    window, stride, segment_ids = _checked(x, window, stride, segment_ids)
    checks.integer("window", window, 1, checks.MOST_INT)  # it is a size of the result
    gather = functools.partial(_gather_windows, window, stride)
    return meshes.partitioned(gather, (x, segment_ids), lambda x, *_: PartitionSpec(x[0], None, None, *x[2:]))


@one_program
def _gather_windows(window: int, stride: int, x: Array, segment_ids: Array | None) -> Array:
    batch, length, heads, width = x.shape
    slots = length // stride
    if length < window:
        return jnp.zeros((batch, slots, window, heads, width), x.dtype)
    if segment_ids is not None:
        return take_windows(x, window_starts(layout(segment_ids, batch, length), window, stride), window, stride)
    parts = x[:, : slots * stride].reshape(batch, slots, stride, heads, width)
    return _fill(jnp.concatenate(_shifted(parts, window // stride), axis=2), slots)


def take_windows(x: Array, starts: Array, window: int, stride: int) -> Array:
    """The windows of x [B, T, H, D] that begin at starts, int32 [B, C]: [B, C, window, H, D].

    Starts ascend in steps of at least `stride`; behind them there is -1 for slots without a window, which get zeros.
    """
    return _take_windows(*vary_together((x, starts)), window, stride, x.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _take_windows(x: Array, starts: Array, window: int, stride: int, length: int) -> Array:
    index = starts[..., None] + jnp.arange(window, dtype=jnp.int32).reshape(1, 1, window)
    windows = jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))(x, index)  # [B, C, window, H, D]
    return jnp.where((starts >= 0)[..., None, None, None], windows, jnp.zeros((), x.dtype))


def _take_forward(x: Array, starts: Array, window: int, stride: int, length: int):
    return _take_windows(x, starts, window, stride, length), starts


def _take_backward(window: int, stride: int, length: int, starts: Array, cotangent: Array):
    token = jnp.arange(length, dtype=jnp.int32)
    begins = jnp.where(starts >= 0, starts, length)
    last = jax.vmap(lambda begins: search(begins, token, "right"))(begins) - 1  # [B, T]
    slot = last[..., None] - jnp.arange(window // stride, dtype=jnp.int32).reshape(1, 1, -1)
    begin = jax.vmap(lambda begins, at: begins.at[at].get(mode="clip"))(begins, jnp.maximum(slot, 0))
    place = token[None, :, None] - begin
    inside = (slot >= 0) & (place < window)
    take = jax.vmap(lambda windows, slot, place: windows.at[slot, place].get(mode="clip"))
    shares = jnp.where(inside[..., None, None], take(cotangent, slot, place), jnp.zeros((), cotangent.dtype))
    return shares.sum(axis=2, dtype=jnp.float32).astype(cotangent.dtype), None


_take_windows.defvjp(_take_forward, _take_backward)


def _shifted(parts: Array, count: int) -> list[Array]:
    """The first, second, ... part of every complete window, from the stride-long parts [B, C, ...] of a row."""
    complete = parts.shape[1] - count + 1
    return [parts[:, first : first + complete] for first in range(count)]


def _fill(windows: Array, slots: int) -> Array:
    """[B, slots, ...]: the windows, then zeros."""
    return jnp.pad(windows, ((0, 0), (0, slots - windows.shape[1])) + ((0, 0),) * (windows.ndim - 2))


def _checked(x: Array, window: int, stride: int, segment_ids: Array | None) -> tuple[int, int, Array | None]:
    checks.tokens("x", x)
    return *checks.windows(window, stride), checks.segment_ids(segment_ids, *x.shape[:2])
