"""A decoder-only language model: RMSNorm, attention, SwiGLU, the layers under one scan."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

import nsa_jax
from nsa_jax import checks, meshes
from nsa_jax.layers.decode import LayerState
from nsa_jax.linen import dense
from nsa_jax.linen.attention import NativeSparseAttention
from nsa_jax.linen.cache_variable import cache_variable
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
        decode: whether the model keeps what it has seen, in the collection "cache", and tokens are those that come
            next, any number at a time; see `NativeSparseAttention`. The caches of all layers lie in the same arrays,
            which the scan carries, so that a step copies none of them.
    """

    config: TransformerConfig
    decode: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> Array:
        """The logits of the token after each.

        Args:
            tokens: integers [B, T].
            segment_ids: integers [B, T], or None for one segment per row; None in decoding.
            lengths: in decoding, integers [B], how many of the tokens belong to each row; all unless given.

        Returns:
            float32 [B, T, vocab_size]; in decoding NaN for tokens that the cache has no room for.
        """
        config = self.config
        batch, length = checks.token_ids("tokens", tokens)
        checks.segment_ids(segment_ids, batch, length)
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=with_logical_axes(nn.initializers.normal(0.02), ("vocab", "embed")),
            name="embed",
        )
        init = functools.partial(self._init_state, batch, length)
        variable, seen = cache_variable(self, init, segment_ids, lengths)
        x = _rows_apart(_look_up(embed, tokens))
        if seen is None:
            layer = nn.remat(Layer, policy=remat_policy(), prevent_cse=False) if config.remat else Layer
            x, _ = _scan(layer, config, nn.broadcast)(config, name="layers")(x, segment_ids)
        else:
            layers = _scan(CachedLayer, config, (0, nn.broadcast, nn.broadcast))(config, name="layers")
            numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
            (x, variable.value), _ = layers((x, seen), numbers, seen.length, lengths)
        x = _norm(config, "norm")(x)
        if config.tie_embeddings:
            return embed.attend(x).astype(jnp.float32)
        return _dense(config, config.vocab_size, ("embed", "vocab"), "head", _lecun_normal)(x).astype(jnp.float32)

    def init_cache(self, batch: int, capacity: int) -> dict[str, LayerState]:
        """The collection "cache" of a model that has seen nothing, with room for `capacity` tokens in each row."""
        return {"state": self._init_state(batch, capacity)}

    def _init_state(self, batch: int, capacity: int) -> LayerState:
        config = self.config
        attention = _attention(config, parent=None)
        return attention.init_state(batch, capacity, config.hidden_size, config.dtype, num_layers=config.num_layers)


def _look_up(embed: nn.Embed, tokens: Array) -> Array:
    """embed(tokens), on a mesh with explicit axes too, where JAX takes rows of a table only if told their sharding."""
    (table,) = embed.promote_dtype(embed.embedding, dtype=embed.dtype, inexact=False)
    table = nn.with_logical_constraint(table, (None, None))  # the table is gathered, not what is taken from it

    def take(tokens, table):
        return jnp.take(table, tokens, axis=0)

    return meshes.partitioned(take, (tokens, table), lambda tokens, _: PartitionSpec(*tokens, None))


def _rows_apart(x: Array) -> Array:
    """x [B, T, D], whose rows alone are sharded, by the rule for "batch", where there are rules and a mesh."""
    return nn.with_logical_constraint(x, ("batch", None, None))


class Layer(nn.Module):
    """One layer, in the form that `nn.scan` wants: (x, segment_ids) -> (x, None)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array | None) -> tuple[Array, None]:
        config = self.config
        x = _rows_apart(x + _attention(config)(_norm(config, "attention_norm")(x), segment_ids))
        return _rows_apart(x + SwiGLU(config, name="mlp")(_norm(config, "mlp_norm")(x))), None


class CachedLayer(nn.Module):
    """One layer in decoding, for `nn.scan`: ((x, state), number, length, lengths) -> ((x, state), None).

    `state` is that of all layers, `number` says which this is, `length` how many tokens rows had before.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Array, LayerState], number: Array, length: Array, lengths: Array | None
    ) -> tuple[tuple[Array, LayerState], None]:
        config, (x, state) = self.config, carry
        if config.num_layers > 1:
            state = state.at(number, length)
        attended, state = _attention(config)(_norm(config, "attention_norm")(x), lengths=lengths, state=state)
        x = x + attended
        return (x + SwiGLU(config, name="mlp")(_norm(config, "mlp_norm")(x)), state), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202, equation 6."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, size = self.config, self.config.swiglu_size
        gate = _dense(config, size, ("embed", "mlp"), "gate", _lecun_normal)(x)
        up = _dense(config, size, ("embed", "mlp"), "up", _lecun_normal)(x)
        return _dense(config, config.hidden_size, ("mlp", "embed"), "down", _residual_init(config))(nn.silu(gate) * up)


def _scan(layer: type[nn.Module], config: TransformerConfig, in_axes) -> type[nn.Module]:
    """As many layers, one after another."""
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _attention(config: TransformerConfig, **fields) -> nn.Module:
    module = {"nsa": NativeSparseAttention, "dense": dense.DenseAttention}[config.attention]
    shared = {field.name for field in dataclasses.fields(module)} & {field.name for field in dataclasses.fields(config)}
    fields |= {name: getattr(config, name) for name in shared}
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
