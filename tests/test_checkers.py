"""Every op under JAX's checkers and exporters; test_eager.py has jax_debug_nans, conftest.py strict promotion."""

import re

import jax
import pytest
from public_ops import EVERY_OP


@pytest.mark.parametrize("name", EVERY_OP)
def test_no_tracer_leaks(name):
    op = EVERY_OP[name]
    with jax.checking_leaks():
        jax.jit(op.output_and_gradients).trace(*op.arrays)


@pytest.mark.parametrize("name", EVERY_OP)
def test_nothing_becomes_64_bits_wide(name):
    op = EVERY_OP[name]
    expected = jax.tree.leaves(jax.eval_shape(op.output_and_gradients, *op.arrays))
    with jax.enable_x64(True):
        traced = jax.jit(op.output_and_gradients).trace(*op.arrays)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(traced.out_info)] == [(x.shape, x.dtype) for x in expected]
    assert not re.findall(r"[fi]64\[\d.*?\]", str(traced.jaxpr))


@pytest.mark.parametrize("name", [name for name in EVERY_OP if "xla" in name and "cu_seqlens" not in name])
def test_exported_for_any_number_of_rows(name):
    op = EVERY_OP[name]
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in op.arrays]
    exported = jax.export.export(jax.jit(op.output_and_gradients))(*shapes)
    assert all(x.shape[0] == rows for x in exported.out_avals)
