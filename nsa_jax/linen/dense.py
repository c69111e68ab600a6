"""Dense causal attention behind the same interface, to compare with."""

from typing import Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from nsa_jax.layers.dense import causal_attention
from nsa_jax.layers.rope import rotate
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
    def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
        """The layer's output.

        Args:
            x: [B, T, features].
            segment_ids: integers [B, T], or None for one segment per row; negative is padding.

        Returns:
            [B, T, out_features]; on padding the bias of the last projection, 0 without one.

        Raises:
            ValueError, TypeError: a field is out of range, or x or segment_ids has a wrong shape or dtype.
        """
        segment_ids, tokens = self.positions(x, segment_ids)
        features = x.shape[-1]
        kv_heads, width, value_width = self.widths(features)
        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (kv_heads, width), KV_HEADS)(x)
        value = self.project("value", (kv_heads, value_width), KV_HEADS)(x)
        if self.rope_theta is not None:
            query, key = (rotate(y, tokens.position, theta=self.rope_theta) for y in (query, key))
        output = causal_attention(query, key, value, segment_ids, implementation=self.implementation)
        return self.project_out(features)(checkpoint_name(output, CHECKPOINT_NAME))
