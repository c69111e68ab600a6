"""One step: what counts as a target, compilations, data parallelism."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_cases import CONFIG, with_model

from nsa_jax.linen import NSATransformer
from nsa_jax.train.mesh import make_mesh, put
from nsa_jax.train.packing import END, PADDING, Rows, pack
from nsa_jax.train.step import init_state, make_optimizer, make_sums, make_train_step

MESH = make_mesh(jax.devices()[:1])


@functools.cache
def train_step(attention="nsa"):
    """The jitted step of CONFIG, compiled once for all tests."""
    return make_train_step(with_model(attention=attention), MESH)


def random_rows(step, length=32, count=4):
    """Rows of documents of all lengths, packed anew at every step."""
    generator = np.random.default_rng(step)
    documents = [
        generator.integers(97, 105, size, np.uint8).tobytes() for size in generator.integers(1, 2 * length, 40)
    ]
    return pack(documents, length).take(generator.permutation(count))


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_fifty_layouts_compile_once_and_the_loss_falls(attention):
    config = with_model(attention=attention)
    step, state = train_step(attention), init_state(config, MESH)
    losses = []
    for number in range(50):
        state, metrics = step(state, *put(random_rows(number), MESH))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert int(state.step) == 50
    assert losses[0] == pytest.approx(np.log(259), abs=0.1)
    # eight letters at random, and the ends: from one in 259 to little more than one in 9
    assert losses[-1] < np.log(20)


def test_targets_are_next_tokens_of_the_same_segment():
    params = init_state(CONFIG, MESH).params
    tokens = np.full((1, 32), PADDING, np.int32)
    segment_ids = np.full((1, 32), -1, np.int32)
    tokens[0, :9] = [256, 65, 66, END, 256, 67, 68, 69, END]
    segment_ids[0, :9] = [0] * 4 + [1] * 5
    nats, targets, num_bytes = jax.jit(make_sums(CONFIG, MESH))(params, *put(Rows(tokens, segment_ids), MESH))
    assert (float(targets), float(num_bytes)) == (3 + 4, 2 + 3)
    apply = jax.jit(NSATransformer(CONFIG.model).apply)
    logits = apply({"params": params}, jnp.asarray(tokens), jnp.asarray(segment_ids))
    logp = jax.nn.log_softmax(logits[0])
    expected = -sum(logp[place, tokens[0, place + 1]] for place in (0, 1, 2, 4, 5, 6, 7))
    np.testing.assert_allclose(nats, expected, rtol=1e-5)  # float32 sums in another order


def test_a_row_of_padding_gives_no_nan():
    empty = Rows(np.full((4, 32), PADDING, np.int32), np.full((4, 32), -1, np.int32))
    state, metrics = train_step()(init_state(CONFIG, MESH), *put(empty, MESH))
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_weight_decay_spares_norms():
    params = init_state(CONFIG, MESH).params
    optimizer = make_optimizer(CONFIG)
    zeros, update = jax.tree.map(jnp.zeros_like, params), jax.jit(optimizer.update)
    # after the first step of warm-up the rate is no longer 0
    _, opt_state = update(zeros, optimizer.init(params), params)
    updates, _ = update(zeros, opt_state, params)
    moved = {name: bool(np.any(leaf)) for name, leaf in flatten_dict(updates, sep="/").items()}
    assert {name for name, any_moved in moved.items() if not any_moved} == {name for name in moved if "scale" in name}


_TWO_DEVICES = """
import json, jax, numpy as np
from train_cases import CONFIG
from test_train_step import random_rows
from nsa_jax.train.mesh import make_mesh, put
from nsa_jax.train.step import init_state, make_train_step
results = []
for count in (1, 2):
    mesh = make_mesh(jax.devices()[:count])
    step, state = make_train_step(CONFIG, mesh), init_state(CONFIG, mesh)
    for number in range(3):
        state, metrics = step(state, *put(random_rows(number), mesh))
    results.append([float(x) for x in metrics.values()] + [float(abs(x).sum()) for x in jax.tree.leaves(state.params)])
print(json.dumps(results))
"""


def test_two_devices_take_the_step_of_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", _TWO_DEVICES], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout)
    # float32 sums in another order, three optimiser steps on
    np.testing.assert_allclose(one, two, rtol=1e-4)
