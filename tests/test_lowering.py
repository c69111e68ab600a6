"""What the ops become for NVIDIA GPUs, on a host that needs none: see lowering.py."""

import json

import lowering
import pytest

from nsa_jax.tiling import SHARED_MEMORY

PASSES = ("forward", "backward_query", "backward_key_value")
SELECTED = {f"nsa_selected_{part}" for part in (*PASSES, "walk", "combine")}
SELECTION = {"nsa_select_blocks"}
COMPRESSED, SLIDING = ({f"nsa_{branch}_{part}" for part in PASSES} for branch in ("compressed", "sliding"))
CLEANING = {"nsa_clean", "nsa_see"}
DECODE = {f"nsa_decode_{part}" for part in ("compressed", "select_blocks", "near", "combine")}
NAMES = {
    "sliding_window_attention": SLIDING | CLEANING,
    "compressed_attention": COMPRESSED | CLEANING,
    "select_blocks": SELECTION,
    "native_sparse_attention": COMPRESSED | SELECTION | SELECTED | SLIDING | CLEANING,
    "decode": DECODE,
    "native_sparse_attention, short window": COMPRESSED | SELECTION | SELECTED | CLEANING,
}


# native_sparse_attention has every kernel of training, so the ops by themselves need one architecture
@pytest.mark.parametrize(
    ("capability", "names"),
    [(90, [name for name in lowering.OPS if name != "native_sparse_attention"])]
    + [(capability, ["native_sparse_attention"]) for capability in (80, 89, 90, 100, 120)]
    + [(capability, ["decode"]) for capability in (80, 89, 100, 120)],
)
def test_forward_and_backward_compile(capability, names):
    facts = json.loads(lowering.script("lowering.py", str(capability), *names))

    assert set(facts["ops"]) == {f"{name} {K}/{V}" for name in names for K, V in lowering.WIDTHS}
    for name, op in facts["ops"].items():
        assert op["kernels"] > 0, name
        # profiles name the branch and the pass
        assert len(op["names"]) == op["kernels"] and set(op["names"]) == NAMES[name.rsplit(" ", 1)[0]], name
        # an exported function is the same after serialisation
        assert op["kernels_restored"] == op["kernels"], name
        # no argument, segment ids among them, has become a constant
        assert op["inputs"] == list(range(op["arguments"])), name
        # nothing of the size of T x T / BLOCK a head: the activations are smaller
        assert op["largest"] < lowering.B * lowering.H * lowering.T * (lowering.T // lowering.BLOCK), name

    assert facts["compiled"]
    for kernel in facts["compiled"]:
        assert not kernel["error"], kernel
        assert kernel["target"].removesuffix("a") == f"sm_{capability}"
        assert kernel["shared"] <= 1024 * SHARED_MEMORY[capability], kernel
        assert not kernel["serialised"], kernel  # its asynchronous products are that
    # the warps of kernels/sm90/selected.py part once the ring is set up
    parting = [kernel for kernel in facts["compiled"] if kernel["warps_part"]]
    assert {kernel["name"] for kernel in parting} == (
        {"forward", "backward_query"} if capability == 90 and names == ["native_sparse_attention"] else set()
    )
    assert all(kernel["barriers"] == 1 for kernel in parting)
    # and they alone run in pairs, one of which copies the keys, the other the values, by the names of their tensor maps
    for kernel in facts["compiled"]:
        assert kernel["cluster"] == (2 if kernel["warps_part"] else 1), kernel
        maps = [f"{kernel['name']}_param_{i}" for i in (1, 8)] if kernel["warps_part"] else []
        assert kernel["maps"] == maps and not kernel["unknown_maps"], kernel
    # those of kernels/sm90/select_blocks.py while they put candidates into their lists
    lists = [kernel["rounds"] for kernel in facts["compiled"] if kernel["name"] == "select" and kernel["gluon"]]
    assert bool(lists) == (capability == 90 and names != ["native_sparse_attention, short window"])
    assert all(rounds and not any(rounds) for rounds in lists)


def test_transformations():
    facts = json.loads(lowering.script("lowering_transforms.py", NSA_JAX_COMPUTE_CAPABILITY="90"))
    kernels = {name: count for name, (count, _) in facts.items()}
    assert kernels["jit"] == kernels["shard_map"] == kernels["vmap"] == kernels["layer"] > 0
    assert 0 < kernels["scan and remat"] < kernels["jit"]  # keys and values need no gradient
    # the gated sum is kept, which a kernel computes; the walk is done again, and keys and compressed keys are cleaned
    assert kernels["squared and remat"] == kernels["squared"] + 3 > 3
    # where a scan stacks the result of a kernel, XLA forgets which operand the result was to share memory with
    assert not any(aliased for _, aliased in facts.values())


def test_largest_tensor():
    assert lowering.largest_tensor("tensor<4x8xf32>, tensor<2x3x16xi32>, tensor<7xi1>, tensor<f32>") == 96


PLACED_ON_A_CPU = """
import jax, jax.numpy as jnp, nsa_jax
x = jnp.ones((1, 16, 1, 16))
try:
    nsa_jax.sliding_window_attention(x, x, x, window_size=4, implementation="triton")
except RuntimeError as error:
    print(error)
"""


def test_triton_on_a_cpu_says_what_is_missing():
    message = lowering.script("-c", PLACED_ON_A_CPU)
    assert "placed on a CPU" in message
    assert "implementation='xla'" in message


SET_UP_BY_THREADS = """
import threading
from nsa_jax.runtime import compile_ahead, jax_triton_setup
install, done = compile_ahead.install, []
compile_ahead.install = lambda library: (install(library), done.append(library))
threads = [threading.Thread(target=jax_triton_setup.load) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(done))
"""


def test_jax_triton_is_set_up_once_whichever_thread_is_first():
    assert int(lowering.script("-c", SET_UP_BY_THREADS)) == 1


JNP_ALONE = """
import sys, jax, jax.numpy as jnp, nsa_jax
x, gate = jnp.ones((1, 40, 1, 16)), jnp.ones((1, 40, 1))
def loss(x):
    gates = dict(compressed_gate=gate, selected_gate=gate, sliding_gate=gate)
    return nsa_jax.native_sparse_attention(x, x, x, block_size=16, **gates).sum()
jax.grad(loss)(x)
print(*sys.modules)
"""


def test_jnp_needs_nothing_of_the_kernels():
    imported = set(lowering.script("-c", JNP_ALONE).split())
    assert "nsa_jax.reference" in imported
    machinery = ("interpreter", "jax_triton_setup", "jax_triton_gluon", "compile_ahead", "kernel_cache")
    assert not {"triton", "jax_triton", "flax", *(f"nsa_jax.runtime.{name}" for name in machinery)} & imported
