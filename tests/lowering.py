"""Lowers and compiles every op, forward and backward, for one NVIDIA architecture on a host that needs no GPU.

A script, run by test_lowering.py in a process of its own (`script`), since Triton's interpreter must be off. It prints
JSON: the facts about each op and width. To add an op, add a row to OPS.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zlib

import jax
import jax.numpy as jnp

B, T, N, H, BLOCK = 1, 262144, 16, 1, 64
WIDTHS = ((64, 64), (128, 128), (192, 128))


def script(*arguments, **environment):
    """The standard output of a Python process on the CPU, in which Triton compiles and does not interpret."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=pathlib.Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "leaked" not in done.stderr  # a word of nanobind's on Gluon's compiler
    return done.stdout


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def qkv(K, V, C=T):
    return struct(B, T, N, K), struct(B, C, H, K), struct(B, C, H, V)


SEGMENT_IDS = struct(B, T, dtype=jnp.int32)


def sliding(K, V):
    import nsa_jax

    def function(query, key, value, segment_ids):
        return nsa_jax.sliding_window_attention(
            query, key, value, window_size=512, segment_ids=segment_ids, implementation="triton"
        )

    return function, (*qkv(K, V), SEGMENT_IDS)


def compressed(K, V):
    import nsa_jax

    def function(query, key, value, segment_ids):
        return nsa_jax.compressed_attention(
            query, key, value, window=BLOCK, stride=BLOCK, segment_ids=segment_ids, implementation="triton"
        )

    return function, (*qkv(K, V, C=T // BLOCK), SEGMENT_IDS)


def selection(K, V):
    import nsa_jax

    stride, window = 16, 32

    def function(query, key, lse, segment_ids):
        return nsa_jax.select_blocks(
            query, key, lse, block_size=BLOCK, window=window, stride=stride, segment_ids=segment_ids,
            implementation="triton",
        )  # fmt: skip

    query, key, _ = qkv(K, V, C=T // stride)
    return function, (query, key, struct(B, T, N, dtype=jnp.float32), SEGMENT_IDS)


def native(K, V, window_size=512):
    import nsa_jax

    def function(query, key, value, compressed_gate, selected_gate, sliding_gate, segment_ids):
        return nsa_jax.native_sparse_attention(
            query,
            key,
            value,
            compressed_gate=compressed_gate,
            selected_gate=selected_gate,
            sliding_gate=sliding_gate,
            block_size=BLOCK,
            window_size=window_size,
            segment_ids=segment_ids,
            implementation="triton",
        )

    return function, (*qkv(K, V), *[struct(B, T, N)] * 3, SEGMENT_IDS)


def native_in_one_pass(K, V):
    return native(K, V, window_size=BLOCK)


def decode(K, V):
    from nsa_jax.branches import Config, PerBranch
    from nsa_jax.gpu import decode

    rows, page_size = 2, 4 * BLOCK
    config = Config(K**-0.5, BLOCK, 512, 32, 16, 1, 2, 16, selects_all=False)

    def function(query, key, value, compressed_key, compressed_value, page_indices, start, count, *gates):
        arrays = query, key, value, compressed_key, compressed_value, page_indices, start, count
        return decode.attend(config, *arrays, PerBranch(*gates), 16)

    def pool(size, width):
        return struct(rows * T // page_size, size, H, width)

    integers = struct(rows, T // page_size, dtype=jnp.int32), *[struct(rows, dtype=jnp.int32)] * 2
    return function, (
        struct(rows, 4, N, K), pool(page_size, K), pool(page_size, V), pool(page_size // 16, K),
        pool(page_size // 16, V), *integers, *[struct(rows, 4, N)] * 3,
    )  # fmt: skip


# name -> (K, V) -> (function of arrays, their shapes and dtypes); gradients are taken where the output is a float
OPS = {
    "sliding_window_attention": sliding,
    "compressed_attention": compressed,
    "select_blocks": selection,
    "native_sparse_attention": native,
    "native_sparse_attention, short window": native_in_one_pass,
    "decode": decode,
}
WITHOUT_GRADIENT = {"decode"}


def with_gradients(function):
    """`function` that also returns the gradients of sum(output ** 2) / 2 for its float arguments."""

    def everything(*arrays):
        floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_floats(*values):
            return function(*(values[floats.index(i)] if i in floats else x for i, x in enumerate(arrays)))

        if not jnp.issubdtype(jax.eval_shape(function, *arrays).dtype, jnp.floating):
            return function(*arrays)
        output, pullback = jax.vjp(of_floats, *(arrays[i] for i in floats))
        return output, pullback(output)

    return everything


def export(function, arrays):
    """The function exported for CUDA."""
    import jax_triton

    allowed = jax.export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[allowed])(*arrays)


def largest_tensor(module: str) -> int:
    """Elements of the largest tensor type in a StableHLO module."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", module)
    return max(math.prod(map(int, shape.rstrip("x").split("x"))) for shape in shapes)


def names(module: str) -> list[str]:
    """What profiles call the kernels of a StableHLO module, one name per launch."""

    def character(escape):
        return escape[1] if escape[1] == "\\" else chr(int(escape[1], 16))

    calls = re.findall(r'@triton_kernel_call\w*\(.*?opaque = "((?:[^"\\]|\\.)*)"', module)
    messages = (zlib.decompress(re.sub(r"\\(\\|[0-9A-F]{2})", character, call).encode("latin-1")) for call in calls)
    fields = (re.search(rb"(.)(nsa_(?!jax\b)\w+)", message, re.DOTALL) for message in messages)
    return [field[2][: field[1][0]].decode() for field in fields]  # its length comes before a name


def loops(ptx: str) -> list[str]:
    """What lies between a label and a later branch back to it."""
    lines = ptx.splitlines()
    labels = {label[1]: i for i, line in enumerate(lines) if (label := re.match(r"(\$\w+):", line))}
    branches = ((re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line), i) for i, line in enumerate(lines))
    return [
        "\n".join(lines[labels[branch[1]] : i]) for branch, i in branches if branch and labels.get(branch[1], i) < i
    ]


def compiled(folder: pathlib.Path) -> list[dict]:
    """Of every kernel in JAX_TRITON_DUMP_DIR the name, shared memory in bytes, and what ptxas says about its PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    from nsa_jax.runtime import jax_triton_gluon

    facts = []
    for info in folder.glob("*/*.compile_info"):
        name, shared = re.fullmatch(r"(\w+): shared_mem_bytes: (\d+)\s*", info.read_text()).groups()
        ptx = info.with_suffix(".ptx")
        code = ptx.read_text()
        target = re.search(r"^\.target (sm_(\d+)\w*)", code, re.MULTILINE)
        ptxas = get_ptxas(int(target[2])).path
        # only what is written in Gluon is to be free of ptxas' advice, which takes full optimisation
        level = ["-O3", "-v"] if "setmaxnreg" in code else ["-O1"]
        command = [ptxas, *level, f"--gpu-name={target[1]}", str(ptx), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        maps = set(re.findall(r"mov\.b64 source, (\w+);", code))
        facts.append(
            {
                "name": name,
                "shared": int(shared),
                "target": target[1],
                "error": done.stderr if done.returncode else "",
                # a scalar of kernels/sm90/selected.py that differs by warp
                "warps_part": "%tid.x; shr.u32" in code,
                # tensor maps that assembly names, and those that are no parameters of the kernel
                "maps": sorted(maps),
                "unknown_maps": sorted(maps - set(re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", code))),
                "cluster": jax_triton_gluon.programs_of_cluster(code),
                "barriers": len(re.findall(r"\bbar\.sync", code)),
                "rounds": [
                    loop.count("bar.sync") for loop in loops(code) if "redux" in loop and "mbarrier" not in loop
                ],
                "gluon": "setmaxnreg" in code,
                "serialised": "setmaxnreg" in code and "serialized" in done.stdout + done.stderr,
            }
        )
    return facts


def facts_about(function, arrays, differentiable: bool) -> dict:
    exported = export(function, arrays)  # without gradients a kernel may write less
    if differentiable:
        exported = export(with_gradients(function), arrays)
    restored = jax.export.deserialize(exported.serialize())
    again = export(restored.call, arrays)
    return {
        "kernels": exported.mlir_module().count("stablehlo.custom_call @triton_kernel_call"),
        "names": names(exported.mlir_module()),
        "kernels_restored": again.mlir_module().count("stablehlo.custom_call @triton_kernel_call"),
        "largest": largest_tensor(exported.mlir_module()),
        "inputs": sorted(exported.module_kept_var_idx),
        "arguments": len(arrays),
    }


def main(capability: int, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"NSA_JAX_COMPUTE_CAPABILITY": str(capability), "JAX_TRITON_DUMP_DIR": folder}
        ops = {
            f"{name} {K}/{V}": facts_about(*OPS[name](K, V), name not in WITHOUT_GRADIENT)
            for name in names or OPS
            for K, V in WIDTHS
        }
        print(json.dumps({"ops": ops, "compiled": compiled(pathlib.Path(folder))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
