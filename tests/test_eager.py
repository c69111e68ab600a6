"""Calls outside jit: one program for each op and each derivative, compiled once."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from public_ops import EVERY_OP, under_jit

from nsa_jax.runtime.eager import one_program, one_program_each

_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: _compiled.append(event) if event.endswith("backend_compile_duration") else None
)


def programs(function, *arrays) -> int:
    """How many programs are compiled for a call."""
    before = len(_compiled)
    jax.block_until_ready(function(*arrays))
    return len(_compiled) - before


@pytest.fixture
def traced():
    """(a function of x and options under one_program, the options of every trace)."""
    traces = []

    @one_program
    def function(x, *options, **named):
        traces.append((options, named))
        doubled = jax.tree.map(lambda x: 2 * x if isinstance(x, jax.Array) else x, options)
        return jax.tree.map(lambda x: x + 1, x), [x for x in jax.tree.leaves(doubled) if isinstance(x, jax.Array)]

    return function, traces


X = jnp.arange(4.0, dtype=jnp.float32)


def test_static_values_are_told_apart_by_type_too(traced):
    function, traces = traced
    for value in (1, True, 1.0, np.float32(1), "1", None, (1, 2), (1, 3), 1, (1, 2)):
        function(X, value)
    kinds = [(type(options[0]), options[0]) for options, _ in traces]
    assert len(traces) == 8
    assert kinds[:4] == [(int, 1), (bool, True), (float, 1.0), (np.float32, 1)]


def test_arrays_anywhere_are_traced(traced):
    function, traces = traced
    for scale in (1, 2):
        x, rest = function({"a": X * scale}, (None, X), where=np.full(2, scale, np.float32))
        assert jnp.array_equal(x["a"], X * scale + 1) and jnp.array_equal(rest[0], 2 * X)
    assert len(traces) == 1
    function(X[:2])
    function(X.astype(jnp.bfloat16))
    assert len(traces) == 3


def test_what_cannot_be_hashed_is_refused(traced):
    function, _ = traced
    with pytest.raises(ValueError, match="hash"):
        function(X, {1, 2})


def test_traced_again_where_the_surroundings_differ(traced, monkeypatch):
    function, traces = traced

    def count():
        function(X)
        function(X)
        return len(traces)

    assert count() == 1
    with jax.default_matmul_precision("bfloat16"):
        assert count() == 2
    with jax.enable_x64(True):
        assert count() == 3
    monkeypatch.setenv("NSA_JAX_COMPUTE_CAPABILITY", "80")
    assert count() == 4
    monkeypatch.setenv("NSA_JAX_COMPUTE_CAPABILITY", "90")
    assert count() == 5
    monkeypatch.delenv("NSA_JAX_COMPUTE_CAPABILITY")
    assert count() == 5


def test_inlined_under_jit(traced):
    function, _ = traced

    def loss(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: function(x)[0])(x), None), x, length=2)[0].sum()

    for wrapped, x in ((loss, X), (jax.grad(loss), X), (jax.vmap(loss), X[None])):
        assert "@function" not in jax.jit(wrapped).lower(x).as_text()


def test_programs_have_the_name_of_the_function(traced):
    function, _ = traced
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **tags: compiled.append(tags.get("fun_name")) if "backend_compile" in event else None
    )
    function(X)
    assert compiled == ["jit(function)"]


def test_what_a_derivative_keeps_is_neither_copied_nor_held():
    """Its arguments and results are kept as they are, and nothing longer than the pullback."""

    @one_program_each
    def function(x, y):
        return x * y, jnp.exp(x)

    def alive():
        gc.collect()
        return len(jax.live_arrays())

    arrays = X, X + 1
    function(*arrays)
    before = alive()
    results, pullback = jax.vjp(function, *arrays)
    assert alive() == before + 2
    assert_close(pullback(results), [arrays[1] * results[0] + results[1] ** 2, arrays[0] * results[0]])
    del pullback, results
    assert alive() == before


def test_a_derivative_computes_what_is_asked_for():
    """No gradient of what is not differentiated, none of a result that is not used."""

    @one_program_each
    def function(x, y, number):
        return x * y * 2, jnp.cos(x) * y, number + 1

    number = jnp.int32(3)
    gradient = jax.grad(lambda x: function(x, x + 1, number)[0].sum())(X)
    assert_close([gradient], [4 * X + 2])
    assert_close([jax.grad(lambda y: function(X, y, number)[1].sum())(X)], [jnp.cos(X)])
    jaxpr = jax.make_jaxpr(lambda y: jax.vjp(lambda y: function(X, y, number)[1], y)[1](X))(X)
    assert "sin" not in str(jaxpr).replace("cosine", "")


def test_derivatives_of_derivatives_and_maps():
    @one_program_each
    def function(x):
        return jnp.sin(x) * x

    def slope(x):
        return jax.grad(lambda x: function(x).sum())(x)

    second = jax.grad(lambda x: slope(x).sum())(X)
    assert_close([second], [2 * jnp.cos(X) - X * jnp.sin(X)])
    assert_close([jax.vmap(jax.vmap(jax.grad(function)))(X[None])[0]], [slope(X)])
    pullback = jax.jit(lambda x: jax.vjp(function, x)[1])(X)
    assert_close(pullback(X * 0 + 1), [slope(X)])


@pytest.mark.parametrize("name", EVERY_OP)
def test_every_op(name):
    """One program for the op and one for each derivative, none at the next call; their results, in which
    jax_debug_nans finds no NaN, are those of `jax.jit`; JAX is not shown what attention keeps."""
    op = EVERY_OP[name]
    floats, others = op.arrays[: op.floats], op.arrays[op.floats :]

    def pullback(*floats):
        return jax.vjp(lambda *floats: op.function(*floats, *others), *floats)[1]

    jax.clear_caches()
    with jax.debug_nans(True):
        assert programs(op.function, *op.arrays) == 1
        assert programs(op.function, *op.arrays) == 0
        results = [op.function(*op.arrays)]
        if op.floats:
            cotangent = jax.tree.map(np.ones_like, *results)
            assert programs(lambda *floats: pullback(*floats)(cotangent), *floats) == 2
            assert programs(lambda *floats: pullback(*floats)(cotangent), *floats) == 0
            results.append(pullback(*floats)(cotangent))
    assert_close(jax.tree.leaves(results), under_jit(name))
    if op.floats >= 3:  # JAX spends host time on each array
        assert len(jax.tree.leaves(pullback(*floats))) == 0
