"""What the derivatives of all branches share: names for rematerialisation policies, and what is kept of a branch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BRANCHES = ("compressed", "selected", "sliding")

#: The names that outputs, lse and selections of the ops carry, for `jax.checkpoint_policies.save_only_these_names`.
#: "nsa_output" is the gated sum of the branches, where a branch's kernel computes it.
CHECKPOINT_NAMES = (
    *(f"nsa_{branch}_{part}" for branch in BRANCHES for part in ("output", "lse")),
    "nsa_block_indices",
    "nsa_output",
)


def name_residuals(branch: str, output: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and lse under their checkpoint names, so that a policy can keep them and skip the forward kernels."""
    return checkpoint_name(output, f"nsa_{branch}_output"), checkpoint_name(lse, f"nsa_{branch}_lse")


def nothing_seen(query: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, V] and lse [B, T, N] of queries that see nothing: zeros and -inf."""
    B, T, N, _ = query.shape
    return jnp.zeros((B, T, N, value.shape[-1]), query.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)


def untouched(query: jax.Array, before: jax.Array | None) -> jax.Array:
    """The gradient of queries that see nothing, added to `before` if given."""
    return jnp.zeros_like(query) if before is None else before


class Branch(NamedTuple):
    """What the backward pass takes of a branch.

    Attributes:
        output: [B, T, N, V], of the forward pass.
        lse: float32 [B, T, N], likewise.
        weight: float32 [B, T, N], wide enough to be copied ahead; the cotangent of the output is weight * d_output.
        d_lse: float32 [B, T, N], the cotangent of the lse; None for 0.
    """

    output: jax.Array
    lse: jax.Array
    weight: jax.Array
    d_lse: jax.Array | None = None


def or_placeholders(branch: Branch, query: jax.Array, before: jax.Array | None) -> tuple[jax.Array, ...]:
    """(lse, d_lse, weight, before) as a kernel takes them: an array of the shape that it does not read for None."""
    lse, weight, d_lse = branch[1:]
    return lse, lse if d_lse is None else d_lse, weight, query if before is None else before
