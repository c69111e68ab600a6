"""The learned compression map: phi, from a window of keys or values to one."""

import jax
import jax.numpy as jnp
from flax import nnx

from nsa_jax.layers.compression import flatten_windows
from nsa_jax.nnx.partitioning import axis_names

Array = jax.Array


class MLPCompression(nnx.Module):
    """phi: an MLP over the flattened window, its tokens told apart by a position embedding. Heads share it.

    Args:
        window: l, tokens of a window.
        width: D, width of a key or value.
        hidden_features: width of the hidden layer; 2 * D unless given.
        dtype, param_dtype: of the computation (the inputs' unless given) and of the parameters.
        kernel_init, bias_init, embedding_init: initialisers.
        rngs: has the stream `params`.

    Source: Yuan et al. 2025, arXiv 2502.11089, equation 7.
    """

    def __init__(
        self,
        window: int,
        width: int,
        *,
        hidden_features: int | None = None,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        embedding_init: nnx.Initializer = nnx.initializers.normal(0.02),
        rngs: nnx.Rngs,
    ):
        def dense(features_in: int, features_out: int, axes: tuple[str, str]) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                kernel_metadata=axis_names(*axes),
                bias_metadata=axis_names(axes[1]),
                rngs=rngs,
            )

        hidden = hidden_features or 2 * width
        self.dtype = dtype
        self.position = nnx.Param(
            embedding_init(rngs.params(), (window, width), param_dtype), **axis_names("window", "kv")
        )
        self.up = dense(window * width, hidden, ("window_kv", "mlp"))
        self.down = dense(hidden, width, ("mlp", "kv"))

    def __call__(self, windows: Array) -> Array:
        """windows [B, C, l, H, D] -> [B, C, H, D]."""
        windows, position = nnx.nn.dtypes.promote_dtype((windows, self.position[...]), dtype=self.dtype)
        return self.down(jax.nn.silu(self.up(flatten_windows(windows, position))))
