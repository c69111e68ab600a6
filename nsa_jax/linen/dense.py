"""Dense causal attention behind the same interface, to compare with."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from nsa_jax.layers.decode import LayerState
from nsa_jax.layers.dense import attend_next, causal_attention, init_state
from nsa_jax.layers.rope import rotate
from nsa_jax.linen.cache_variable import cache_variable
from nsa_jax.linen.projections import HEADS, KV_HEADS, Projections

Array = jax.Array

#: The name that the attention output carries, for rematerialisation policies.
CHECKPOINT_NAME = "dense_output"


class DenseAttention(Projections):
    """Causal attention within each segment, exact and without a [T, T] mask; fields as in `Projections`.

    Attributes:
        implementation: "triton" (the project's kernel with a window as long as the row), "xla", or None to choose by
            device; then cuDNN takes rows without segment ids on an NVIDIA GPU.
    """

    implementation: Literal["triton", "xla"] | None = None

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
        features, position = x.shape[-1], tokens.position
        kv_heads, width, value_width = self.widths(features)
        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (kv_heads, width), KV_HEADS)(x)
        value = self.project("value", (kv_heads, value_width), KV_HEADS)(x)
        init = functools.partial(self.init_state, *x.shape[:2], features, key.dtype)
        variable, seen = cache_variable(self, init, segment_ids, lengths, state)
        if seen is not None:
            position = seen.length[:, None] + position
        if self.rope_theta is not None:
            query, key = (rotate(y, position, theta=self.rope_theta) for y in (query, key))
        if seen is None:
            output = causal_attention(query, key, value, segment_ids, implementation=self.implementation)
            return self.project_out(features)(checkpoint_name(output, CHECKPOINT_NAME))
        output, seen = attend_next(seen, query, key, value, lengths, implementation=self.implementation)
        output = self.project_out(features)(output)
        if variable is None:
            return output, seen
        variable.value = seen
        return output

    def init_state(
        self, batch: int, capacity: int, features: int, dtype: jnp.dtype, *, num_layers: int = 1
    ) -> LayerState:
        """The state of a layer, or of several, that has seen nothing, with room for `capacity` tokens a row."""
        return init_state(batch, capacity, self.widths(features), dtype, num_layers=num_layers)
