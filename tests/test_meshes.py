"""The ops on sharded arrays under plain `jax.jit`: each device does its own rows and groups of heads."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


def facts(what):
    done = subprocess.run(
        [sys.executable, "meshes.py", what],
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_every_op_stays_where_its_rows_and_heads_are(implementation):
    for name, fact in facts(implementation).items():
        assert fact["collectives"] == [], name
        assert fact["shares"] == (4 if name.endswith("both") else 2), name
        assert fact["same_bits"], name
        assert fact["difference"] <= 2e-5, name  # sums of the same numbers in the same order, or nearly


def test_what_cannot_stay_is_gathered_with_a_warning():
    found = facts("gathered")
    for name, part in {"groups": "2 groups of heads", "tokens": "sharded over tokens"}.items():
        said, difference = found[name]
        assert len(said) == 1 and part in said[0], said
        assert difference <= 2e-5
