"""The arms of the recall experiments, and which blocks a model's queries get to see."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import nsa_jax
from nsa_jax.linen import TransformerConfig
from nsa_jax.linen.transformer import Layer
from nsa_jax.rows.segments import layout

Array = jax.Array

_FIELDS = {
    "dense": {"attention": "dense"},
    "nsa": {},
    "nsa-no-selected": {"branches": ("compressed", "sliding")},
    "sliding": {"branches": ("sliding",)},
    "nsa-random": {},
}
ARMS = tuple(_FIELDS)
#: Arms whose queries select blocks.
SELECTING = ("nsa", "nsa-random")


def config_of(arm: str, model: TransformerConfig) -> TransformerConfig:
    """The model with the arm's attention, all else equal."""
    return dataclasses.replace(model, **_FIELDS[arm])


@contextlib.contextmanager
def blocks_of(arm: str, seen: list[Array] | None = None) -> Iterator[None]:
    """While it is open, models are traced with the arm's selection.

    Args:
        arm: "nsa-random" puts blocks drawn at random in place of the most important ones, forced blocks stay.
        seen: gets the block indices int32 [B, T, H, S] of each layer, in order, where layers are traced one by one.
    """
    if arm not in SELECTING or (arm == "nsa" and seen is None):
        yield
        return
    attend, select = nsa_jax.native_sparse_attention, nsa_jax.select_blocks
    seen = [] if seen is None else seen

    def chosen(query, compressed_key, lse, *, heads, **options):
        if arm == "nsa-random":
            blocks = _random_blocks(query, heads, **options)
        else:
            blocks = select(query, compressed_key, lse, **options)
        seen.append(blocks)
        return blocks

    def attend_instead(query, key, value, *, compressed_key=None, compressed_value=None, **options):
        common = {name: options[name] for name in ("segment_ids", "implementation")}
        sizes = {name: options[f"compression_{name}"] or options["block_size"] for name in ("window", "stride")}
        if compressed_key is None:  # the means, which the op would make
            means = functools.partial(nsa_jax.compress, **sizes, segment_ids=options["segment_ids"])
            compressed_key, compressed_value = means(key), means(value)
        _, lse = nsa_jax.compressed_attention(
            query, compressed_key, compressed_value, **sizes, **common, return_residual=True
        )
        names = ("block_counts", "block_size", "num_init_blocks", "num_local_blocks")
        rules = {name: options[name] for name in names}
        blocks = chosen(query, compressed_key, lse, heads=key.shape[2], **rules, **sizes, **common)
        return attend(
            query, key, value, **options, block_indices=blocks, compressed_key=compressed_key,
            compressed_value=compressed_value,
        )  # fmt: skip

    def select_instead(query, compressed_key, lse, **options):
        return chosen(query, compressed_key, lse, heads=compressed_key.shape[2], **options)

    with mock.patch.multiple(nsa_jax, native_sparse_attention=attend_instead, select_blocks=select_instead):
        yield


def chosen_blocks(arm: str, config: TransformerConfig, params: Any, tokens: Array, segment_ids: Array) -> list[Array]:
    """Block indices int32 [B, T, H, S] of each layer of an `NSATransformer`."""
    seen: list[Array] = []
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0).astype(config.dtype)
    with blocks_of(arm, seen):
        for number in range(config.num_layers):
            own = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
            x, _ = Layer(config).apply({"params": own}, x, segment_ids)
    return seen


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _random(query, segment_ids, heads, block_counts, block_size, num_init_blocks, num_local_blocks):
    batch, length = query.shape[:2]
    own = layout(segment_ids, batch, length).position[:, :, None, None] // block_size
    block = jnp.arange(-(-length // block_size), dtype=jnp.int32)[None, None, None]
    # drawn anew for each batch and layer: the queries are the seed
    seed = jax.lax.bitcast_convert_type(query.astype(jnp.float32).sum(), jnp.int32)
    rank = jax.random.uniform(jax.random.key(seed), (batch, length, heads, block.size))
    rank = jnp.where(block < num_init_blocks, rank + 1, rank)
    rank = jnp.where(block > own - num_local_blocks, rank + 2, rank)
    rank, blocks = jax.lax.top_k(jnp.where(block <= own, rank, -1.0), min(block_counts, block.size))
    return jnp.where(rank < 0, -1, blocks).astype(jnp.int32)


def _random_blocks(query: Array, heads: int, *, segment_ids: Array | None, **options: Any) -> Array:
    names = ("block_counts", "block_size", "num_init_blocks", "num_local_blocks")
    return _random(jax.lax.stop_gradient(query), segment_ids, heads, *(options[name] for name in names))
