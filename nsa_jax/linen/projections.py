"""The projections that the attention modules share."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from nsa_jax.layers import attention
from nsa_jax.linen.logical_axes import with_logical_axes
from nsa_jax.rows.segments import Layout

Array = jax.Array

#: Logical axes of the head dimensions: a rule for "heads" and "kv_heads" shards attention by head.
HEADS = ("heads", "kv")
KV_HEADS = ("kv_heads", "kv")


class Projections(nn.Module):
    """Fields and submodules that every attention module has; none of its own behaviour.

    Attributes:
        num_heads: N, query heads.
        num_kv_heads: H, key and value heads; divides N; N unless given.
        head_dim: K, width of queries and keys, even; features // N unless given.
        value_dim: V, width of values; K unless given.
        out_features: width of the output; that of the input unless given.
        rope_theta: base of the rotary position embedding, None for none.
        use_bias: whether the projections have biases.
        dtype, param_dtype: of the computation (the inputs' unless given) and of the parameters.
        kernel_init, out_kernel_init, bias_init: initialisers; out_kernel_init is kernel_init unless given.
        decode: whether the layer keeps what it has seen, in the collection "cache", and its input are the tokens that
            come next, any number at a time. As in `nn.MultiHeadDotProductAttention`, `init` makes an empty cache, with
            room for as many tokens as its input has; apply with `mutable=["cache"]`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    out_features: int | None = None
    rope_theta: float | None = 10_000.0
    use_bias: bool = False
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    decode: bool = False

    def widths(self, features: int) -> tuple[int, int, int]:
        """(H, K, V) for inputs of so many features."""
        return attention.widths(self, features)

    def positions(self, x: Array, segment_ids: Array | None) -> tuple[Array | None, Layout]:
        """See `nsa_jax.layers.attention.positions`."""
        return attention.positions(x, segment_ids)

    def project(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nn.DenseGeneral:
        """A projection from the features to heads."""
        return self._dense(name, shape, -1, ("embed", *axes), axes, self.kernel_init)

    def project_out(self, features: int) -> nn.DenseGeneral:
        """The projection from [B, T, N, V] to the output."""
        init = self.out_kernel_init or self.kernel_init
        return self._dense("out", self.out_features or features, (-2, -1), (*HEADS, "embed"), ("embed",), init)

    def _dense(self, name, features, axis, kernel_axes, bias_axes, init) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=with_logical_axes(init, kernel_axes),
            bias_init=with_logical_axes(self.bias_init, bias_axes),
            name=name,
        )
