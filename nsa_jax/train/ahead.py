"""What is known before anything is written: whether a step can be compiled, and whether it fits into memory."""

import contextlib
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nsa_jax.train.config import TrainConfig
from nsa_jax.train.memory import check_fits
from nsa_jax.train.mesh import row_shares, rows_sharding
from nsa_jax.train.step import TrainState, abstract_state, make_train_step


def check_memory(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError for sizes of which a device cannot even hold the state or the logits."""
    device, logit = mesh.local_devices[0], 4 * config.model.vocab_size
    leaves = jax.tree.leaves(_abstract_state(config, mesh))
    state = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    check_fits("hidden_size, num_layers, num_heads, head_dim: parameters and optimiser take", state, device)
    tokens = config.batch_size // row_shares(mesh) * config.sequence_length
    check_fits("batch_size, sequence_length: the logits of a step take", tokens * logit, device)
    check_fits("sample_bytes: the logits take", config.sample_bytes * logit, device)


def compile_step(config: TrainConfig, mesh: Mesh) -> Callable:
    """`make_train_step`, compiled.

    Raises:
        ValueError: that fails, or a step takes more memory than there is.
    """
    shape = config.batch_size, config.sequence_length
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows_sharding(mesh))
    state = _abstract_state(config, mesh)
    with _one_line():
        step = make_train_step(config, mesh).lower(state, batch, batch).compile()
    if (sizes := step.memory_analysis()) is not None:
        size = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        check_fits("batch_size, sequence_length: a step takes", size, mesh.local_devices[0])
    return step


def _abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    with _one_line():
        return abstract_state(config, mesh)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What tracing and compiling raise of numbers that make no model, as a ValueError of one line."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
