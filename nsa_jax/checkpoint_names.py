"""The names that results of the ops carry, for rematerialisation policies."""

import jax
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
