"""The learned compression map: phi, from a window of keys or values to one."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from nsa_jax.layers.compression import flatten_windows
from nsa_jax.linen.logical_axes import with_logical_axes

Array = jax.Array


class MLPCompression(nn.Module):
    """phi: an MLP over the flattened window, its tokens told apart by a position embedding. Heads share it.

    Attributes:
        hidden_features: width of the hidden layer; 2 * D unless given.
        dtype, param_dtype: of the computation (the inputs' unless given) and of the parameters.
        kernel_init, bias_init, embedding_init: initialisers.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 7.
    """

    hidden_features: int | None = None
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, windows: Array) -> Array:
        """windows [B, C, l, H, D] -> [B, C, H, D]."""
        window, width = windows.shape[2], windows.shape[4]
        position_init = with_logical_axes(self.embedding_init, ("window", "kv"))
        position = self.param("position", position_init, (window, width), self.param_dtype)
        windows, position = nn.dtypes.promote_dtype(windows, position, dtype=self.dtype)
        flat = flatten_windows(windows, position)
        hidden = nn.silu(self._dense("up", self.hidden_features or 2 * width, ("window_kv", "mlp"))(flat))
        return self._dense("down", width, ("mlp", "kv"))(hidden)

    def _dense(self, name: str, features: int, axes: tuple[str, str]) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=with_logical_axes(self.kernel_init, axes),
            bias_init=with_logical_axes(self.bias_init, axes[1:]),
            name=name,
        )
