"""Types that callers see: overloads by return_residual, and the names that `implementation` takes."""

import inspect
import typing

import jax
import pytest

import nsa_jax
from nsa_jax import checks
from nsa_jax.linen import NativeSparseAttention, TransformerConfig

OPS = [getattr(nsa_jax, name) for name in nsa_jax.__all__ if inspect.isfunction(getattr(nsa_jax, name))]
RESIDUAL = [op for op in OPS if "return_residual" in inspect.signature(op).parameters]


@pytest.mark.parametrize("op", RESIDUAL, ids=lambda op: op.__name__)
def test_return_residual_decides_the_type_of_the_result(op):
    own = inspect.signature(op).parameters
    without, with_residual = map(inspect.signature, typing.get_overloads(op))
    for overload in (without, with_residual):
        assert list(overload.parameters) == list(own)
        same = [name for name in own if name != "return_residual"]
        assert [overload.parameters[name] for name in same] == [own[name] for name in same]
    assert without.return_annotation is jax.Array
    assert with_residual.return_annotation == tuple[jax.Array, jax.Array]
    choices = [overload.parameters["return_residual"] for overload in (without, with_residual)]
    assert [choice.annotation for choice in choices] == [typing.Literal[False], typing.Literal[True]]
    assert [choice.default for choice in choices] == [False, inspect.Parameter.empty]


def test_ops_with_a_residual_are_found():
    assert {op.__name__ for op in RESIDUAL} >= {
        "compressed_attention",
        "selected_attention",
        "sliding_window_attention",
    }


@pytest.mark.parametrize("function", [*OPS, NativeSparseAttention, TransformerConfig], ids=lambda x: x.__name__)
def test_implementation_is_one_of_the_names_that_are_checked(function):
    annotation = typing.get_type_hints(function).get("implementation")
    if annotation is not None:
        names = [name for part in typing.get_args(annotation) for name in typing.get_args(part)]
        assert {None, *names} == set(checks.IMPLEMENTATIONS)
