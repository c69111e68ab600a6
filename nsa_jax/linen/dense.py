"""Dense causal attention behind the same interface, to compare with."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from nsa_jax.layers.rope import rotate
from nsa_jax.linen.projections import HEADS, KV_HEADS, Projections
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
    def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
        """x [B, T, features], segment_ids integers [B, T] (negative: padding, output 0) -> [B, T, out_features]."""
        segment_ids, tokens = self.positions(x, segment_ids)
        length, features = x.shape[1:]
        kv_heads, width, value_width = self.widths(features)
        if value_width != width:
            raise ValueError(f"value_dim: expected head_dim={width}, got {value_width}")
        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (kv_heads, width), KV_HEADS)(x)
        value = self.project("value", (kv_heads, width), KV_HEADS)(x)
        if self.rope_theta is not None:
            query, key = (rotate(y, tokens.position, theta=self.rope_theta) for y in (query, key))
        in_segment = tokens.start[:, :, None] == tokens.start[:, None, :]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        fused = device.on_nvidia_gpu() and query.dtype in (jnp.bfloat16, jnp.float16)
        output = jax.nn.dot_product_attention(
            query, key, value, mask=(in_segment & causal)[:, None], implementation="cudnn" if fused else None
        )
        output = clear_padding(checkpoint_name(output, CHECKPOINT_NAME), tokens.valid)
        return self.project_out(features)(output)
