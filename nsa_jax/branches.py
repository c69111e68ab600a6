"""The three branches in their order, which both implementations follow."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Config(NamedTuple):
    """The static arguments of `native_sparse_attention`; window and stride are those of the compression.

    ascending: whether query indices, if any, are known to ascend, see `rows.queries.locate`.
    """

    scale: float
    block_size: int
    window_size: int
    window: int
    stride: int
    num_init_blocks: int
    num_local_blocks: int
    max_block_count: int
    selects_all: bool  # every block there can be, known without looking at data: nothing is to be selected
    ascending: bool = False


class Arrays(NamedTuple):
    """What is attended with and to; compressed arrays are None where neither branch nor selection needs them."""

    query: Array
    key: Array
    value: Array
    compressed_key: Array | None
    compressed_value: Array | None


class PerBranch(NamedTuple):
    """A value per branch, such as a gate, an output or an lse; None for a branch that is dropped."""

    compressed: Array | None = None
    selected: Array | None = None
    sliding: Array | None = None


class Routing(NamedTuple):
    """Integers: what a query may see, and what it is told to select.

    Attributes:
        segment_ids: [B, T], or None for one segment per row.
        query_indices: [B, Tq], or None for one query at each token.
        block_indices: [B, Tq, H, S], or None to select.
        block_counts: () or [B, Tq, H].
    """

    segment_ids: Array | None
    query_indices: Array | None
    block_indices: Array | None
    block_counts: Array


def selects(config: Config, gates: PerBranch, block_indices: Array | None = None) -> bool:
    """Whether blocks are to be selected by compressed keys; block_indices: those that are given."""
    return gates.selected is not None and block_indices is None and not config.selects_all


def needs_windows(config: Config, gates: PerBranch, block_indices: Array | None = None) -> bool:
    """Whether a branch or the selection looks at compressed keys; block_indices as in `selects`."""
    return gates.compressed is not None or selects(config, gates, block_indices)


class Implementation(Protocol):
    """What an implementation does for `run`; outputs are [B, Tq, N, V], an lse is float32 [B, Tq, N]."""

    def compressed(self) -> tuple[Array, Array]:
        """Output and lse of the compressed branch."""

    def select(self, lse: Array) -> Array:
        """block_indices int32 [B, Tq, H, S], by the lse of the compressed branch."""

    def selected(self, block_indices: Array, block_counts: Array | None, lse: Array | None) -> tuple[Array, Array]:
        """Output and lse of the selected branch; lse: by which the blocks were selected, if they were."""

    def all_selected(self) -> tuple[Array, Array]:
        """Output and lse of the selected branch where every block is selected."""

    def sliding(self, outputs: PerBranch) -> tuple[Array | None, Array]:
        """Output and lse of the sliding branch; outputs: of the branches before it."""


def run(
    implementation: Implementation, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing
) -> tuple[PerBranch, PerBranch]:
    """Outputs and lse of the branches that have a gate."""
    outputs, lses = PerBranch(), PerBranch()
    block_indices, block_counts, lse = routing.block_indices, routing.block_counts, None
    if arrays.compressed_key is not None:
        output, lse = implementation.compressed()
        if gates.compressed is not None:
            outputs, lses = outputs._replace(compressed=output), lses._replace(compressed=lse)
        if selects(config, gates, block_indices):
            block_indices, block_counts = implementation.select(lse), None
        else:
            lse = None
    if gates.selected is not None:
        if config.selects_all:
            output, lse = implementation.all_selected()
        else:
            output, lse = implementation.selected(block_indices, block_counts, lse)
        outputs, lses = outputs._replace(selected=output), lses._replace(selected=lse)
    if gates.sliding is not None:
        output, lse = implementation.sliding(outputs)
        outputs, lses = outputs._replace(sliding=output), lses._replace(sliding=lse)
    return outputs, lses


def nothing_seen(query: Array, value: Array) -> tuple[Array, Array]:
    """The output [B, Tq, N, V] and lse [B, Tq, N] of queries that see nothing: zeros and -inf."""
    B, Tq, N, _ = query.shape
    return jnp.zeros((B, Tq, N, value.shape[-1]), query.dtype), jnp.full((B, Tq, N), -jnp.inf, jnp.float32)


def tainted(lse: Array, heads: int) -> Array:
    """bool [B, Tq, H]: whose blocks were selected by an lse that is NaN, since a value that was seen is not finite."""
    batch, length, query_heads = lse.shape
    return jnp.isnan(lse.reshape(batch, length, heads, query_heads // heads)).any(axis=-1)


def gated_sum(gates: PerBranch, outputs: PerBranch, query: Array, value: Array) -> Array:
    """The sum of gate * output [B, Tq, N, V] over the branches, in float32, rounded to query's dtype."""
    total = jnp.zeros((*query.shape[:3], value.shape[-1]), jnp.float32)
    for gate, output in zip(gates, outputs, strict=True):
        if gate is not None:
            total += gate.astype(jnp.float32)[..., None] * output.astype(jnp.float32)
    return total.astype(query.dtype)
