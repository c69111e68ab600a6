"""What the derivatives of all branches share: names for rematerialisation policies, and delta."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BRANCHES = ("compressed", "selected", "sliding")

#: The names that outputs, lse and selections of the ops carry, for `jax.checkpoint_policies.save_only_these_names`.
CHECKPOINT_NAMES = (
    *(f"nsa_{branch}_{part}" for branch in BRANCHES for part in ("output", "lse")),
    "nsa_block_indices",
)


def name_residuals(branch: str, output: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and lse under their checkpoint names, so that a policy can keep them and skip the forward kernels."""
    return checkpoint_name(output, f"nsa_{branch}_output"), checkpoint_name(lse, f"nsa_{branch}_lse")


def nothing_seen(query: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, V] and lse [B, T, N] of queries that see nothing: zeros and -inf."""
    B, T, N, _ = query.shape
    return jnp.zeros((B, T, N, value.shape[-1]), query.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)


def output_dot(d_output: jax.Array, output: jax.Array) -> jax.Array:
    """float32 rowsum(d_output * output), [B, T, N]: FlashAttention's delta, and the gradient of a gate."""
    return jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)


def ungated_delta(d_output: jax.Array, d_lse: jax.Array, output: jax.Array, lse: jax.Array) -> jax.Array:
    """The float32 [B, T, N] that the score gradients subtract, where output and lse [B, T, N] both have a cotangent."""
    # a query that sees nothing has a constant lse, whatever its cotangent holds
    return jnp.where(lse == -jnp.inf, 0.0, output_dot(d_output, output) - d_lse)
