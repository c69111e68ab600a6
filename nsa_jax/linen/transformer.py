"""A decoder-only language model: RMSNorm, attention, SwiGLU, the layers under one scan."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

import nsa_jax
from nsa_jax import checks, meshes
from nsa_jax.linen import dense
from nsa_jax.linen.attention import NativeSparseAttention
from nsa_jax.linen.config import TransformerConfig
from nsa_jax.linen.logical_axes import with_logical_axes

Array = jax.Array

_lecun_normal = nn.initializers.lecun_normal()


def remat_policy() -> Callable:
    """The checkpoint policy that keeps attention outputs and lse, so that no forward kernel runs twice."""
    return jax.checkpoint_policies.save_only_these_names(*nsa_jax.CHECKPOINT_NAMES, dense.CHECKPOINT_NAME)


class NSATransformer(nn.Module):
    """Tokens to logits.

    Layers are under `nn.scan`: their parameters have a leading axis, logically named "layers". Parameters are boxed by
    `LogicalAxes` with the axes "vocab", "embed", "heads", "kv_heads", "kv", "branches", "mlp",
    "window" and "window_kv"; `flax.linen.unbox` takes the boxes off.

    Attributes:
        config: sizes and choices.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: Array, segment_ids: Array | None = None, query_indices: Array | None = None) -> Array:
        """tokens int32 [B, T], segment_ids int32 [B, T] or None -> logits float32 [B, T, vocab_size].

        query_indices: int32 [B, T] or None, see `NativeSparseAttention`.
        """
        config = self.config
        checks.segment_ids(segment_ids, *checks.token_ids("tokens", tokens))
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=with_logical_axes(nn.initializers.normal(0.02), ("vocab", "embed")),
            name="embed",
        )
        layer = nn.remat(Layer, policy=remat_policy(), prevent_cse=False) if config.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, name="layers")(_look_up(embed, tokens), segment_ids, query_indices)
        x = _norm(config, "norm")(x)
        if config.tie_embeddings:
            return embed.attend(x).astype(jnp.float32)
        return _dense(config, config.vocab_size, ("embed", "vocab"), "head", _lecun_normal)(x).astype(jnp.float32)


def _look_up(embed: nn.Embed, tokens: Array) -> Array:
    """embed(tokens), on a mesh with explicit axes too, where JAX takes rows of a table only if told their sharding."""
    (table,) = embed.promote_dtype(embed.embedding, dtype=embed.dtype, inexact=False)

    def take(tokens, table):
        return jnp.take(table, tokens, axis=0)

    return meshes.partitioned(take, (tokens, table), lambda tokens, _: PartitionSpec(*tokens, None))


class Layer(nn.Module):
    """One layer, in the form that `nn.scan` wants: (x, segment_ids, query_indices) -> (x, None)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array | None, query_indices: Array | None = None) -> tuple[Array, None]:
        config = self.config
        places = () if query_indices is None else (query_indices,)  # dense attention takes none
        x = x + _attention(config)(_norm(config, "attention_norm")(x), segment_ids, *places)
        return x + SwiGLU(config, name="mlp")(_norm(config, "mlp_norm")(x)), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202, equation 6."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, size = self.config, self.config.swiglu_size
        gate = _dense(config, size, ("embed", "mlp"), "gate", _lecun_normal)(x)
        up = _dense(config, size, ("embed", "mlp"), "up", _lecun_normal)(x)
        return _dense(config, config.hidden_size, ("mlp", "embed"), "down", _residual_init(config))(nn.silu(gate) * up)


def _attention(config: TransformerConfig) -> nn.Module:
    module = {"nsa": NativeSparseAttention, "dense": dense.DenseAttention}[config.attention]
    shared = {field.name for field in dataclasses.fields(module)} & {field.name for field in dataclasses.fields(config)}
    fields = {name: getattr(config, name) for name in shared}
    return module(**fields, out_kernel_init=_residual_init(config), name="attention")


def _residual_init(config: TransformerConfig) -> nn.initializers.Initializer:
    """lecun_normal over the number of residual branches, so that the stream's variance does not grow with depth."""
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")


def _norm(config: TransformerConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_init=with_logical_axes(nn.initializers.ones_init(), ("embed",)),
        name=name,
    )


def _dense(config: TransformerConfig, features: int, axes: tuple[str, str], name: str, init) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=with_logical_axes(init, axes),
        name=name,
    )
