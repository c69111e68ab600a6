"""Rotary positions, compression and the three branches, as functions of a layer's fields.

`layer` is any object with the fields of `nsa_jax.linen.NativeSparseAttention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import nsa_jax
from nsa_jax import checks, meshes
from nsa_jax.layers.rope import rotate
from nsa_jax.rows.segments import Layout, layout
from nsa_jax.rows.windows import window_starts

Array = jax.Array

BRANCHES = ("compressed", "selected", "sliding")


def widths(layer: Any, features: int) -> tuple[int, int, int]:
    """(H, K, V) for inputs of so many features.

    Raises:
        ValueError: N is not a multiple of H, or a width is none that the kernels have.
    """
    num_heads = checks.integer("num_heads", layer.num_heads, 1)
    kv_heads = num_heads if layer.num_kv_heads is None else checks.integer("num_kv_heads", layer.num_kv_heads, 1)
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads={kv_heads}, got {num_heads}")
    if layer.head_dim is None and features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {features} features, got {num_heads}")
    width = features // num_heads if layer.head_dim is None else layer.head_dim
    value_width = width if layer.value_dim is None else layer.value_dim
    checks.head_width("head_dim" if layer.value_dim is None else "value_dim", value_width)
    return kv_heads, checks.head_width("head_dim", width), value_width


def positions(x: Array, segment_ids: Array | None) -> tuple[Array | None, Layout]:
    """Checked segment ids, and where the tokens of x [B, T, features] stand: [B, T], or [1, T] for all rows alike.

    Raises:
        ValueError, TypeError: x or segment_ids has a wrong shape or dtype.
    """
    batch, length, _ = checks.features("x", x)
    segment_ids = checks.segment_ids(segment_ids, batch, length)
    if segment_ids is None:
        return None, layout(None, 1, length)
    place = functools.partial(layout, batch=batch, length=length)
    specs = Layout(*[0] * 4)
    return segment_ids, meshes.partitioned(
        place, (segment_ids,), lambda ids: jax.tree.map(lambda _: PartitionSpec(*ids), specs)
    )


def branches_in_use(layer: Any) -> tuple[str, ...]:
    """The layer's branches in the order of `BRANCHES`.

    Raises:
        ValueError: a branch is unknown, none is left, or a learned map would get no gradient.
    """
    unknown = sorted(set(layer.branches) - set(BRANCHES))
    if unknown:
        raise ValueError(f"branches: expected some of {BRANCHES}, got {unknown[0]!r}")
    used = tuple(b for b in BRANCHES if b in layer.branches and (b != "sliding" or layer.window_size > 0))
    if not used:
        raise ValueError(f"branches: none left of {layer.branches} with window_size={layer.window_size}")
    if layer.compression != "mean" and "compressed" not in used:
        raise ValueError("compression: a learned map needs the compressed branch, selection gives it no gradient")
    return used


def window_sizes(layer: Any) -> dict[str, int]:
    """The compression window and stride, as the ops call them."""
    window, stride = (
        layer.block_size if size is None else size for size in (layer.compression_window, layer.compression_stride)
    )
    names = ("compression_window", "compression_stride")
    window, stride = checks.windows(window, stride, checks.block_size(layer.block_size), names=names)
    return {"window": window, "stride": stride}


def by_branch(layer: Any, x: Array, branches: tuple[str, ...]) -> dict[str, Array]:
    """x [B, T, branches, H, D], or [B, T, H, D] for all of them."""
    return {branch: x[:, :, i] if layer.separate_keys else x for i, branch in enumerate(branches)}


def rotate_to(layer: Any, x: Array, position: Array) -> Array:
    """x [B, T, H, K] turned to its positions, int32 [B, T], if the layer does so."""
    return x if layer.rope_theta is None else rotate(x, position, theta=layer.rope_theta)


def attend(
    layer: Any,
    query: Array,
    key: Array,
    value: Array,
    gate: Array,
    *,
    tokens: Layout,
    segment_ids: Array | None,
    maps: tuple[Callable, Callable] | None,
) -> Array:
    """The gated sum of the layer's branches.

    Args:
        layer: the fields.
        query: [B, T, N, K], before rotation.
        key, value: [B, T, H, K] and [B, T, H, V]; with `separate_keys` [B, T, branches, H, ...].
        gate: [B, T, branches, N].
        tokens, segment_ids: from `positions`.
        maps: the learned maps of keys and of values, [B, C, l, H, D] to [B, C, H, D]; None for the mean.

    Returns:
        [B, T, N, V].
    """
    branches = branches_in_use(layer)
    query = rotate_to(layer, query, tokens.position)
    keys, values = by_branch(layer, key, branches), by_branch(layer, value, branches)
    if layer.separate_keys:
        rotated = {branch: rotate_to(layer, keys[branch], tokens.position) for branch in branches}
    else:
        rotated = by_branch(layer, rotate_to(layer, key, tokens.position), branches)
    gates = {branch: gate[:, :, i] for i, branch in enumerate(branches)}

    compressed = None, None
    source = next((branch for branch in ("compressed", "selected") if branch in branches), None)
    if source is not None:
        compressed = _compress(layer, keys[source], rotated[source], values[source], tokens, segment_ids, maps)
    branch_attention = _attend_separate if layer.separate_keys else _attend_shared
    return branch_attention(layer, query, rotated, values, *compressed, gates, segment_ids)


def _compress(layer, key, rotated, value, tokens, segment_ids, maps) -> tuple[Array, Array]:
    """Compressed keys and values [B, T // d, H, D], of keys before and after rotation and of values."""
    sizes = window_sizes(layer)
    if maps is None:
        return tuple(nsa_jax.compress(x, **sizes, segment_ids=segment_ids) for x in (rotated, value))
    start = window_starts(tokens, **sizes)  # [B, C]
    windows = (nsa_jax.gather_windows(x, **sizes, segment_ids=segment_ids) for x in (key, value))
    key, value = (
        jnp.where((start >= 0)[:, :, None, None], phi(x), jnp.zeros((), x.dtype))  # phi(0) need not be 0
        for phi, x in zip(maps, windows, strict=True)
    )
    last = jnp.maximum(start, 0) + sizes["window"] - 1
    position = jnp.take_along_axis(tokens.position, jnp.minimum(last, tokens.position.shape[1] - 1), axis=1)
    return rotate_to(layer, key, position), value


def _attend_shared(layer, query, keys, values, compressed_key, compressed_value, gates, segment_ids) -> Array:
    any_branch = next(iter(keys))
    return nsa_jax.native_sparse_attention(
        query,
        keys[any_branch],
        values[any_branch],
        **{f"{branch}_gate": gate for branch, gate in gates.items()},
        block_counts=layer.block_counts,
        block_size=layer.block_size,
        window_size=layer.window_size,
        compression_window=layer.compression_window,
        compression_stride=layer.compression_stride,
        compressed_key=compressed_key,
        compressed_value=compressed_value,
        num_init_blocks=layer.num_init_blocks,
        num_local_blocks=layer.num_local_blocks,
        segment_ids=segment_ids,
        implementation=layer.implementation,
    )


def _attend_separate(layer, query, keys, values, compressed_key, compressed_value, gates, segment_ids) -> Array:
    common = {"segment_ids": segment_ids, "implementation": layer.implementation}
    sizes = window_sizes(layer)
    outputs = {}
    if compressed_key is not None:
        outputs["compressed"], lse = nsa_jax.compressed_attention(
            query, compressed_key, compressed_value, **sizes, **common, return_residual=True
        )
    if "selected" in gates:
        block_indices = nsa_jax.select_blocks(
            query,
            compressed_key,
            lse,
            block_counts=layer.block_counts,
            block_size=layer.block_size,
            num_init_blocks=layer.num_init_blocks,
            num_local_blocks=layer.num_local_blocks,
            **sizes,
            **common,
        )
        outputs["selected"] = nsa_jax.selected_attention(
            query, keys["selected"], values["selected"], block_indices, block_size=layer.block_size, **common
        )
    if "sliding" in gates:
        outputs["sliding"] = nsa_jax.sliding_window_attention(
            query, keys["sliding"], values["sliding"], window_size=layer.window_size, **common
        )
    return sum(gate[..., None] * outputs[branch] for branch, gate in gates.items())
