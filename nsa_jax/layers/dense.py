"""Exact causal attention within segments, the fastest that the device has."""

import jax
import jax.numpy as jnp

import nsa_jax
from nsa_jax import meshes
from nsa_jax.layers.decode import LayerState, empty_cache, stacked, without_windows
from nsa_jax.runtime import device

Array = jax.Array


def causal_attention(
    query: Array, key: Array, value: Array, segment_ids: Array | None, *, implementation: str | None = None
) -> Array:
    """Each query sees its segment's keys up to its own.

    Where every row is one segment, an NVIDIA GPU has cuDNN for it. Packed rows have a window as long as the row: its
    kernel passes over other segments' tiles, and no mask [T, T] is made, which is what cuDNN would need.

    Args:
        query: [B, T, N, K].
        key: [B, T, H, K].
        value: [B, T, H, V].
        segment_ids: integers [B, T], or None for one segment per row; negative is padding.
        implementation: "triton" or "xla" for the window; None to choose by device.

    Returns:
        [B, T, N, V], 0 on padding.
    """
    if segment_ids is None and implementation is None and _cudnn_takes(query, value):
        return meshes.partitioned(_cudnn, (query, key, value), lambda *axes: meshes.attention_specs(*axes)[0])
    return nsa_jax.sliding_window_attention(
        query, key, value, window_size=query.shape[1], segment_ids=segment_ids, implementation=implementation
    )


def attend_next(
    state: LayerState, query: Array, key: Array, value: Array, lengths: Array | None, *, implementation: str | None
) -> tuple[Array, LayerState]:
    """Attention of the next tokens of each row to all that were.

    Args:
        state: what was.
        query, key, value: [B, Tq, N, K], [B, Tq, H, K] and [B, Tq, H, V] of the next tokens, rotated.
        lengths: integers [B], how many of them belong to each row; all unless given.
        implementation: "triton", "xla", or None to choose by device.

    Returns:
        [B, Tq, N, V], and the state that has seen them.
    """
    cache = nsa_jax.extend_cache(state.cache, key, value, lengths=lengths)
    output = nsa_jax.cached_attention(
        query, cache, sliding_gate=1.0, window_size=cache.capacity, implementation=implementation
    )
    return output, LayerState(cache)


def init_state(
    batch: int, capacity: int, widths: tuple[int, int, int], dtype: jnp.dtype, *, num_layers: int = 1
) -> LayerState:
    """The state of dense layers that have seen nothing; widths: H, K and V."""
    return LayerState(stacked(without_windows(empty_cache(batch, capacity, widths, dtype=dtype)), num_layers))


def _cudnn(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _cudnn_takes(query: Array, value: Array) -> bool:
    """Whether cuDNN has a kernel for these on the devices in use."""
    width = query.shape[-1]
    return (
        device.on_nvidia_gpu()
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and value.shape[-1] == width
        and width % 8 == 0
        and width <= 128  # 256 only from Hopper on
    )
