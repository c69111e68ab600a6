"""Decoding in a layer: what it keeps of the tokens that were, and its output for those that come.

`layer` is any object with the fields of `nsa_jax.linen.NativeSparseAttention`. Letters as in the package docstring; L
layers keep their states in the same arrays, so that a scan over layers carries them and copies none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import nsa_jax
from nsa_jax.decode import FEW_QUERIES
from nsa_jax.layers.attention import branches_in_use, by_branch, rotate_to, window_sizes
from nsa_jax.rows import cache as rows
from nsa_jax.rows.cache import KVCache

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """What layers keep of the tokens of B rows; each part is None where the layer has no use for it.

    Attributes:
        cache: keys and values of all tokens and windows, for the compressed and the selected branch, and the sliding
            one where it shares their keys.
        near: a ring of the keys and values that the sliding branch may still see, where it has keys of its own.
        tail_key, tail_value: [B, L, l - 1, H, D], the last tokens, where the next windows are made of them and are not
            means of the cache's keys.
    """

    cache: KVCache | None = None
    near: KVCache | None = None
    tail_key: Array | None = None
    tail_value: Array | None = None

    @property
    def length(self) -> Array:
        """int32 [B], tokens in each row."""
        return (self.near if self.cache is None else self.cache).length

    def at(self, layer: Array, length: Array) -> "LayerState":
        """The state of layer number `layer`, int32 [], in which rows have `length` tokens, int32 [B]."""
        caches = {"cache": self.cache, "near": self.near}
        moved = {
            name: dataclasses.replace(x, layer=layer, length=length) for name, x in caches.items() if x is not None
        }
        return dataclasses.replace(self, **moved)


def init_state(
    layer: Any,
    batch: int,
    capacity: int,
    widths: tuple[int, int, int],
    dtype: jnp.dtype,
    *,
    learned: bool,
    num_layers: int = 1,
) -> LayerState:
    """The state of layers that have seen nothing.

    Args:
        layer: the fields.
        batch: B.
        capacity: T, the tokens that a row has room for.
        widths: H, K and V.
        dtype: of keys and values.
        learned: whether windows go through a learned map.
        num_layers: L.
    """
    branches, sizes = branches_in_use(layer), window_sizes(layer)
    heads, key_width, value_width = widths
    options = {
        "block_size": layer.block_size,
        "compression_window": sizes["window"],
        "compression_stride": sizes["stride"],
        "dtype": dtype,
    }
    cache = near = tail_key = tail_value = None
    if branches != ("sliding",):
        cache = stacked(empty_cache(batch, capacity, widths, **options), num_layers)
    if "sliding" in branches and (layer.separate_keys or cache is None):
        slots = min(layer.window_size, capacity) + FEW_QUERIES - 1
        near = without_windows(empty_cache(batch, slots, widths, **options))
        near = stacked(dataclasses.replace(near, ring_capacity=capacity), num_layers)
    if learned or (layer.separate_keys and {"compressed", "selected"} <= set(branches)):
        tail_key, tail_value = (
            jnp.zeros((batch, num_layers, sizes["window"] - 1, heads, width), dtype)
            for width in (key_width, value_width)
        )
    return LayerState(cache, near, tail_key, tail_value)


def empty_cache(batch: int, capacity: int, widths: tuple[int, int, int], *, block_size: int = 64, **options) -> KVCache:
    """`init_cache` of whole blocks."""
    return nsa_jax.init_cache(batch, -(-capacity // block_size) * block_size, *widths, block_size=block_size, **options)


def without_windows(cache: KVCache) -> KVCache:
    """An empty cache in which no windows are kept."""
    return dataclasses.replace(cache, compressed_key=None, compressed_value=None)


def stacked(cache: KVCache, num_layers: int) -> KVCache:
    """A cache for as many layers, of which `layer` says one; itself for one layer."""
    if num_layers == 1:
        return cache
    names = ("key", "value", "compressed_key", "compressed_value")
    arrays = {name: getattr(cache, name) for name in names}
    arrays = {name: x if x is None else jnp.concatenate([x] * num_layers, axis=1) for name, x in arrays.items()}
    return dataclasses.replace(cache, **arrays, layer=jnp.zeros((), jnp.int32), num_layers=num_layers)


def attend_next(
    layer: Any,
    state: LayerState,
    query: Array,
    key: Array,
    value: Array,
    gate: Array,
    *,
    lengths: Array | None,
    maps: tuple[Callable, Callable] | None,
) -> tuple[Array, LayerState]:
    """The gated sum of the layer's branches for the next tokens of each row, and the state that has seen them.

    Args:
        layer: the fields.
        state: what the layer has seen.
        query: [B, Tq, N, K], before rotation.
        key, value: [B, Tq, H, K] and [B, Tq, H, V]; with `separate_keys` [B, Tq, branches, H, ...].
        gate: [B, Tq, branches, N].
        lengths: integers [B], how many of the tokens belong to each row; all unless given.
        maps: the learned maps of keys and of values, [B, C, l, H, D] to [B, C, H, D]; None for the mean.

    Returns:
        [B, Tq, N, V], and the state.
    """
    branches = branches_in_use(layer)
    position = state.length[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    query = rotate_to(layer, query, position)
    keys, values = by_branch(layer, key, branches), by_branch(layer, value, branches)
    if layer.separate_keys:
        rotated = {branch: rotate_to(layer, keys[branch], position) for branch in branches}
    else:
        rotated = by_branch(layer, rotate_to(layer, key, position), branches)
    gates = {branch: gate[:, :, i] for i, branch in enumerate(branches)}
    options = {"window_size": layer.window_size, "implementation": layer.implementation}
    outputs, tokens = [], query.shape[1]
    if state.cache is not None:
        source, compressed, joined = branches[0], None, None
        tails = state.tail_key, state.tail_value
        if state.tail_key is not None:
            pooled = (rotated if maps is None else keys)[source], values[source]
            joined = [_join(state, *pair) for pair in zip(tails, pooled, strict=True)]
            compressed = _new_windows(layer, state.cache, joined, tokens, maps)
        kept = "selected" if "selected" in branches else source
        cache = nsa_jax.extend_cache(state.cache, rotated[kept], values[kept], lengths=lengths, compressed=compressed)
        here = [branch for branch in branches if branch != "sliding" or state.near is None]
        outputs.append(
            nsa_jax.cached_attention(
                query,
                cache,
                **{f"{branch}_gate": gates[branch] for branch in here},
                block_counts=layer.block_counts,
                num_init_blocks=layer.num_init_blocks,
                num_local_blocks=layer.num_local_blocks,
                **options,
            )
        )
        lengths = cache.length - cache.start
        state = dataclasses.replace(state, cache=cache)
        if joined is not None:
            tail_key, tail_value = (_cut_tail(state, *pair, lengths) for pair in zip(tails, joined, strict=True))
            state = dataclasses.replace(state, tail_key=tail_key, tail_value=tail_value)
    if state.near is not None:
        attend = _attend_ring if tokens <= FEW_QUERIES else _attend_beside_ring
        arrays = query, rotated["sliding"], values["sliding"], gates["sliding"]
        output, near = attend(state.near, *arrays, lengths, options)
        outputs.append(output)
        state = dataclasses.replace(state, near=near)
    return sum(outputs), state


def _attend_ring(ring, query, key, value, gate, lengths, options) -> tuple[Array, KVCache]:
    """The sliding branch for tokens that the ring has room for beside all that they see."""
    ring = nsa_jax.extend_cache(ring, key, value, lengths=lengths)
    return nsa_jax.cached_attention(query, ring, sliding_gate=gate, **options), ring


def _attend_beside_ring(ring, query, key, value, gate, lengths, options) -> tuple[Array, KVCache]:
    """The sliding branch for any number of tokens: they see what the ring holds and one another."""
    before = min(options["window_size"], ring.capacity) - 1
    position = ring.length[:, None] + jnp.arange(-before, 0, dtype=jnp.int32)[None]
    near = [
        jnp.concatenate([rows.read(ring, kept, position), new], axis=1)
        for kept, new in ((ring.key, key), (ring.value, value))
    ]
    ring = nsa_jax.extend_cache(ring, key, value, lengths=lengths)
    place, lost = rows.placement(ring, query.shape[1])
    number = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    is_placed = number < place.count[:, None]
    exists = jnp.concatenate([position >= 0, is_placed], axis=1)
    output = nsa_jax.sliding_window_attention(
        query,
        *near,
        segment_ids=jnp.where(exists, 0, -1),
        query_indices=jnp.where(is_placed, before + number, -1),
        **options,
    )
    output = jnp.where(is_placed[..., None, None], gate[..., None] * output, jnp.zeros((), output.dtype))
    return jnp.where(lost[..., None, None], jnp.asarray(jnp.nan, output.dtype), output), ring


def _number(state: LayerState) -> Array | int:
    return 0 if state.cache.layer is None else state.cache.layer


def _join(state: LayerState, tail: Array, new: Array) -> Array:
    """[B, l - 1 + Tq, H, D], the last tokens and the new ones."""
    tail = jax.lax.dynamic_index_in_dim(tail, _number(state), axis=1, keepdims=False)
    return jnp.concatenate([tail, new.astype(tail.dtype)], axis=1)


def _cut_tail(state: LayerState, tail: Array, joined: Array, appended: Array) -> Array:
    """The tail after so many of the new tokens, int32 [B], in place of the one before."""
    count = tail.shape[2]
    last = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, count))(joined, appended)
    return jax.lax.dynamic_update_index_in_dim(tail, last, _number(state), axis=1)


def _new_windows(layer, cache, joined, tokens, maps) -> tuple[Array, Array]:
    """Compressed keys and values [B, M, H, D] of the windows that `tokens` new tokens complete, at most."""
    sizes = window_sizes(layer)
    window, stride = sizes["window"], sizes["stride"]
    number = rows.windows_complete(cache, cache.length)[:, None]
    number = number + jnp.arange(rows.most_windows(cache, tokens), dtype=jnp.int32)[None]  # [B, M]
    first = number * stride - cache.length[:, None] + window - 1
    index = first[..., None] + jnp.arange(window, dtype=jnp.int32).reshape(1, 1, window)
    windows = [jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))(x, index) for x in joined]
    if maps is None:
        return tuple(x.mean(axis=2, dtype=jnp.float32).astype(x.dtype) for x in windows)
    key, value = (phi(x).astype(x.dtype) for phi, x in zip(maps, windows, strict=True))
    return rotate_to(layer, key, number * stride + window - 1), value
