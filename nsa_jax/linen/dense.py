"""Dense causal attention behind the same interface, to compare with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import nsa_jax
from nsa_jax.layers.decode import LayerState, stacked
from nsa_jax.layers.rope import rotate
from nsa_jax.linen.cache_variable import cache_variable
from nsa_jax.linen.projections import HEADS, KV_HEADS, Projections
from nsa_jax.rows import cache as rows
from nsa_jax.rows.segments import clear_padding
from nsa_jax.runtime import device

Array = jax.Array

#: The name that the attention output carries, for rematerialisation policies.
CHECKPOINT_NAME = "dense_output"


class DenseAttention(Projections):
    """Causal attention within each segment by `jax.nn.dot_product_attention`; fields as in `Projections`.

    value_dim must be head_dim, as that function wants. On an NVIDIA GPU half precision goes through cuDNN.
    """

    @nn.compact
    def __call__(
        self,
        x: Array,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
        state: LayerState | None = None,
    ) -> Array | tuple[Array, LayerState]:
        """x [B, T, features] -> [B, T, out_features]; arguments as in `NativeSparseAttention`, output 0 at padding."""
        segment_ids, tokens = self.positions(x, segment_ids)
        length, features = x.shape[1:]
        kv_heads, width, value_width = self.widths(features)
        if value_width != width:
            raise ValueError(f"value_dim: expected head_dim={width}, got {value_width}")
        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (kv_heads, width), KV_HEADS)(x)
        value = self.project("value", (kv_heads, width), KV_HEADS)(x)
        init = functools.partial(self.init_state, *x.shape[:2], features, key.dtype)
        variable, seen = cache_variable(self, init, segment_ids, lengths, state)
        position = tokens.position
        if seen is not None:
            position = seen.length[:, None] + position
        if self.rope_theta is not None:
            query, key = (rotate(y, position, theta=self.rope_theta) for y in (query, key))
        if seen is not None:
            output, seen = _attend_next(seen, query, key, value, lengths)
            output = self.project_out(features)(output)
            if variable is None:
                return output, seen
            variable.value = seen
            return output
        in_segment = tokens.start[:, :, None] == tokens.start[:, None, :]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        fused = device.on_nvidia_gpu() and query.dtype in (jnp.bfloat16, jnp.float16)
        output = jax.nn.dot_product_attention(
            query, key, value, mask=(in_segment & causal)[:, None], implementation="cudnn" if fused else None
        )
        output = clear_padding(checkpoint_name(output, CHECKPOINT_NAME), tokens.valid)
        return self.project_out(features)(output)

    def init_state(
        self, batch: int, capacity: int, features: int, dtype: jnp.dtype, *, num_layers: int = 1
    ) -> LayerState:
        """The state of a layer, or of several, that has seen nothing, with room for `capacity` tokens a row."""
        cache = nsa_jax.init_cache(batch, capacity, *self.widths(features), dtype=dtype)
        return LayerState(stacked(dataclasses.replace(cache, compressed_key=None, compressed_value=None), num_layers))


def _attend_next(
    state: LayerState, query: Array, key: Array, value: Array, lengths: Array | None
) -> tuple[Array, LayerState]:
    """Attention of the next tokens to all that were: [B, Tq, N, K], and the state that has seen them."""
    cache = nsa_jax.extend_cache(state.cache, key, value, lengths=lengths)
    place, lost = rows.placement(cache, query.shape[1])
    number = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    is_seen = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None] <= (place.start[:, None] + number)[..., None]
    whole = (rows.whole_rows(cache, x) for x in (cache.key, cache.value))
    output = jax.nn.dot_product_attention(query, *whole, mask=is_seen[:, None])
    output = clear_padding(output, number < place.count[:, None])
    output = jnp.where(lost[..., None, None], jnp.asarray(jnp.nan, output.dtype), output)
    return output, dataclasses.replace(state, cache=cache)
