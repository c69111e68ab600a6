"""Every public op on sharded arrays under plain `jax.jit`, on 8 CPU devices.

A script, run by test_meshes.py in a process of its own, which has so many devices. It takes the implementation and
prints JSON: the facts about each op and way of sharding.
"""

import json
import os
import re
import sys
import warnings

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import public_ops
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_default_matmul_precision", "highest")
public_ops.N, public_ops.H = 4, 2

COLLECTIVE = re.compile(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")
BOTH = {"both": ("rows", "heads")}
EACH = {"rows": ("rows", None), "heads": (None, "heads"), **BOTH}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(axis_type, devices):
    shape, names = (2, 2, devices // 4), ("rows", "heads", "others")
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * 3, devices=jax.devices()[:devices])


def placed(arrays, mesh, rows, heads):
    def put(x):
        of_heads = x.ndim > 2 and x.shape[2] in (public_ops.N, public_ops.H)
        spec = PartitionSpec(rows, None, heads) if of_heads else PartitionSpec(rows)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return [put(x) for x in arrays]


def computation(op):
    """A function of the op's arrays: its output, and gradients for a cotangent that depends on it."""

    def results(*arrays):
        floats, others = arrays[: op.floats], arrays[op.floats :]
        if not floats:
            return op.function(*others)
        output, pullback = jax.vjp(lambda *floats: op.function(*floats, *others), *floats)
        return output, pullback(jax.tree.map(jnp.tanh, output))

    return jax.jit(results)


def difference(actual, expected):
    """The root-mean-square of the difference, relative to what is expected."""
    if np.issubdtype(expected.dtype, np.integer):
        return float(np.any(actual != expected))
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    actual, expected = (np.where(finite, x, 0.0) for x in (actual, expected))
    error, size = (np.sqrt(np.mean(x**2)) for x in (actual - expected, expected))
    return float(error / max(size, 1e-30))


def facts(op, mesh, axes, expected):
    arrays = placed(op.arrays, mesh, *axes)
    program = computation(op).lower(*arrays).compile()
    results, again = (jax.tree.leaves(program(*arrays)) for _ in range(2))
    return {
        "difference": max(map(difference, jax.device_get(results), expected)),
        "same_bits": all(
            np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in zip(results, again, strict=True)
        ),
        "collectives": COLLECTIVE.findall(program.as_text()),
        "shares": min(x.size // x.addressable_shards[0].data.size for x in results),
    }


def main(implementation):
    found = {}
    for name, op in public_ops.public_ops(implementation).items():
        if name == "segment_ids_from_cu_seqlens":  # has no rows
            continue
        whole = name == "native_sparse_attention"
        expected = jax.device_get(jax.tree.leaves(computation(op)(*op.arrays)))
        devices = 8 if implementation == "xla" else 4  # the interpreter does what replicas do, too
        ways = [(AUTO, EACH if whole and implementation == "xla" else BOTH)]
        if whole or implementation == "xla":
            ways.append((EXPLICIT, BOTH))
        for axis_type, shardings in ways:
            mesh = mesh_of(axis_type, devices)
            for sharding, axes in shardings.items():
                found[f"{name}, {axis_type.name}, {sharding}"] = facts(op, mesh, axes, expected)
    print(json.dumps(found))


def gathered():
    """Prints what is said, and how many collectives there are, where arrays cannot stay where they are."""
    op = public_ops.public_ops("triton")["sliding_window_attention"]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AUTO,), devices=jax.devices()[:4])
    query, key, value, segment_ids = op.arrays
    found = {}
    for name, spec in {"groups": PartitionSpec(None, None, "x"), "tokens": PartitionSpec(None, "x")}.items():
        shares = jax.device_put(query, NamedSharding(mesh, spec))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = jax.jit(op.function).lower(shares, key, value, segment_ids).compile()
            jax.jit(lambda *arrays: op.function(*arrays)[0]).lower(shares, key, value, segment_ids).compile()
        said = [str(warning.message) for warning in caught if "nsa_jax" in str(warning.message)]
        expected = op.function(query, key, value, segment_ids)[0]
        found[name] = [
            said,
            difference(jax.device_get(program(shares, key, value, segment_ids)[0]), np.asarray(expected)),
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    gathered() if sys.argv[1] == "gathered" else main(sys.argv[1])
