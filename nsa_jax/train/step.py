"""The optimiser and the jitted steps, data parallel over a mesh."""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nsa_jax.linen import NSATransformer
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.packing import BEGIN, Rows

Array = jax.Array

AXIS = "data"


@flax.struct.dataclass
class TrainState:
    """What a step changes, and all that a checkpoint holds.

    Attributes:
        step: int32 [], steps taken.
        params: the model's parameters, without partitioning boxes.
        opt_state: optax's.
    """

    step: Array
    params: dict
    opt_state: optax.OptState


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """A mesh with the one axis "data"."""
    return Mesh(np.array(devices), (AXIS,))


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate / 10,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""

    def is_matrix(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=0.95, weight_decay=config.weight_decay, mask=is_matrix),
    )

    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)


def make_init(config: TrainConfig, mesh: Mesh) -> Callable:
    """A jitted function () -> the state before the first step, replicated over the mesh; a function of the seed."""

    def init():
        tokens = jnp.zeros((1, config.model.block_size), jnp.int32)
        params = nn.unbox(NSATransformer(config.model).init(jax.random.key(config.seed), tokens))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params))

    return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()))


def init_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state before the first step."""
    return make_init(config, mesh)()


def put(rows: Rows, mesh: Mesh) -> tuple[Array, Array]:
    """(tokens, segment_ids) [B, T] on the mesh, rows over its devices."""
    return jax.device_put(tuple(rows), NamedSharding(mesh, PartitionSpec(AXIS)))


def make_sums(config: TrainConfig, mesh: Mesh) -> Callable:
    """A function (params, tokens, segment_ids) -> (nats, targets, bytes): float32 sums over the rows of all devices.

    A target is the next token of the same segment; a byte is a target that is one.
    """
    model = NSATransformer(config.model)

    # each device has its rows to itself: a Triton kernel cannot be partitioned for it
    def sums(params, tokens, segment_ids):
        logits = model.apply({"params": params}, tokens, segment_ids)[:, :-1]
        target = tokens[:, 1:]
        counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        parts = jnp.where(counts, nats, 0.0), counts, counts & (target < BEGIN)
        return jax.lax.psum([part.astype(jnp.float32).sum() for part in parts], AXIS)

    rows, same = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(sums, mesh=mesh, in_specs=(same, rows, rows), out_specs=same)


def make_train_step(config: TrainConfig, mesh: Mesh) -> Callable:
    """A jitted function (state, tokens, segment_ids) -> (state, metrics), which consumes the state.

    Metrics are scalars: float32 loss in nats per target, bits_per_byte, grad_norm before clipping; bool finite, whether
    these and all of the new state are.
    """
    sums, optimizer = make_sums(config, mesh), make_optimizer(config)

    def step(state: TrainState, tokens: Array, segment_ids: Array):
        def loss(params):
            nats, targets, num_bytes = sums(params, tokens, segment_ids)
            return nats / jnp.maximum(targets, 1.0), bits_per_byte(nats, num_bytes)

        (value, bits), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "bits_per_byte": bits, "grad_norm": optax.tree.norm(grads)}
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, params, opt_state))]
        metrics["finite"] = jnp.stack(finite).all()
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def bits_per_byte(nats: Array, num_bytes: Array) -> Array:
    """nats / ln 2 per byte: what it takes to write down the text, ends of documents included."""
    return nats / jnp.maximum(num_bytes, 1.0) / jnp.log(2.0)
