"""The optimiser and the jitted steps, on a mesh."""

import contextlib
from collections.abc import Callable, Iterator

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nsa_jax.linen import NSATransformer
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.mesh import RULES, like_params, param_shardings
from nsa_jax.train.packing import BEGIN

Array = jax.Array


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


def _boxed_params(config: TrainConfig) -> dict:
    tokens = jnp.zeros((1, config.model.block_size), jnp.int32)
    return NSATransformer(config.model).init(jax.random.key(config.seed), tokens)["params"]


def _init(config: TrainConfig) -> TrainState:
    params = nn.unbox(_boxed_params(config))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params))


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    params = param_shardings(jax.eval_shape(lambda: _boxed_params(config)), mesh)
    state = jax.eval_shape(lambda: _init(config))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        like_params(state, params, mesh),
    )


def init_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, a function of the seed: on each device of the mesh its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: _init(config), out_shardings=shardings)()


@contextlib.contextmanager
def _sharded_activations(mesh: Mesh) -> Iterator[None]:
    """Around the tracing of the model: its activations are put on the mesh by the logical axis rules."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield


def make_sums(config: TrainConfig, mesh: Mesh) -> Callable:
    """A function (params, tokens, segment_ids) -> (nats, targets, bytes): float32 sums over all rows, to be jitted.

    A target is the next token of the same segment; a byte is a target that is one.
    """
    model = NSATransformer(config.model)

    def sums(params, tokens, segment_ids):
        with _sharded_activations(mesh):
            logits = model.apply({"params": params}, tokens, segment_ids)[:, :-1]
        target = tokens[:, 1:]
        counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        parts = jnp.where(counts, nats, 0.0), counts, counts & (target < BEGIN)
        return [part.astype(jnp.float32).sum() for part in parts]

    return sums


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

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def bits_per_byte(nats: Array, num_bytes: Array) -> Array:
    """nats / ln 2 per byte: what it takes to write down the text, ends of documents included."""
    return nats / jnp.maximum(num_bytes, 1.0) / jnp.log(2.0)
