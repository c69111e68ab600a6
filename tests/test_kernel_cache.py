"""Triton's kernels kept on disk: compiled once, found by the next process, made anew where a file is broken."""

import dataclasses
import shutil
import types

import jax
import lowering
import pytest
from jax_triton.triton_lib import CompilationResult, TensorDescMeta

from nsa_jax.runtime import kernel_cache

BACKEND = types.SimpleNamespace(parse_options=lambda options: types.SimpleNamespace(hash=lambda: str(options)))


@dataclasses.dataclass
class Process:
    """Stands for the module jax_triton.triton_lib of one process, and counts what is compiled."""

    scratch: int | None = None
    _JAX_TRITON_DUMP_DIR: str = ""

    CompilationResult = CompilationResult
    triton_kernel_call_lib = types.SimpleNamespace(TritonKernel=lambda *arguments: arguments)

    def __post_init__(self):
        process = self
        self.compiled = []

        class TritonFunction:
            def __init__(self, source, module):
                self.fn = types.SimpleNamespace(cache_key=source, fn=types.SimpleNamespace(__module__=module))

            def _compile_kernel(self, spec, gpu_target, backend, backend_options):
                source = self.fn.cache_key
                process.compiled.append(source)
                meta = [dict.fromkeys(TensorDescMeta.__required_keys__, 1)]
                scratch = {"global_scratch_size": process.scratch, "global_scratch_align": process.scratch}
                result = CompilationResult(
                    f"ptx of {source}", "kernel", 4096, "long", "longer", tensordesc_meta=meta, **scratch
                )
                options = backend.parse_options(backend_options)
                return ("kernel", 4, 1, 4096, result.binary, f"ttir of {source}", 90), "ttir", options, result

        self.TritonFunction = TritonFunction
        kernel_cache.install(self)

    def __call__(self, source, *, spec="spec", warps=4, capability=90, module="nsa_jax.kernels.selected"):
        target = types.SimpleNamespace(arch=capability)
        options = {"num_warps": warps, "num_ctas": 1}
        return self.TritonFunction(source, module)._compile_kernel(spec, target, BACKEND, options)


@pytest.fixture
def set_folder():
    before = jax.config.jax_compilation_cache_dir
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def folder(tmp_path, set_folder):
    set_folder(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("scratch", [None, 128])
def test_another_process_compiles_nothing(folder, scratch):
    first, second = Process(scratch), Process(scratch)
    _, ttir, _, made = first("a")
    kernel, ttir_again, _, found = second("a")
    assert (first.compiled, second.compiled) == (["a"], [])
    assert ttir_again == ttir
    assert kernel == ("kernel", 4, 1, 4096, "ptx of a", ttir, 90, *([scratch, scratch] if scratch else []))
    assert dataclasses.replace(made, ttgir="", llir="") == found
    assert all(path.parent == folder / "nsa_jax" and path.suffix == ".json" for path in folder.rglob("*.*"))


@pytest.mark.parametrize("other", [{"source": "b"}, {"spec": "other"}, {"warps": 8}, {"capability": 80}])
def test_kernels_and_architectures_are_told_apart(folder, other):
    process = Process()
    for changes in ({}, other, {}):
        process(**{"source": "a"} | changes)
    assert process.compiled == ["a", other.get("source", "a")]


@pytest.mark.parametrize("changed", [None, "kernels/selected.py", "kernels/sm90/pairs.py", "jax_triton_gluon.py"])
def test_changed_source(folder, monkeypatch, changed):
    Process()("a")
    copied = shutil.copytree(kernel_cache.kernels.__path__[0], folder / "kernels")
    shutil.copy(kernel_cache.jax_triton_gluon.__file__, folder / "jax_triton_gluon.py")
    if changed:
        with (folder / changed).open("a") as file:
            file.write("\n")
    monkeypatch.setattr(kernel_cache.kernels, "__path__", [str(copied)])
    monkeypatch.setattr(kernel_cache.jax_triton_gluon, "__file__", str(folder / "jax_triton_gluon.py"))
    kernel_cache._sources.cache_clear()
    process = Process()
    process("a")
    monkeypatch.undo()
    kernel_cache._sources.cache_clear()
    assert process.compiled == (["a"] if changed else [])


def test_switches_of_the_compiler(folder, monkeypatch):
    Process()("a")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    process = Process()
    process("a")
    assert process.compiled == ["a"]


@pytest.mark.parametrize("content", ["", '{"binary"', "[1]", "{}", '{"ttir": "", "binary": "ptx"}'])
def test_broken_file_is_made_anew(folder, content):
    Process()("a")
    (path,) = (folder / "nsa_jax").iterdir()
    path.write_text(content)
    second, third = Process(), Process()
    assert second("a")[3].binary == third("a")[3].binary == "ptx of a"
    assert (second.compiled, third.compiled) == (["a"], [])


def test_folder_that_cannot_be_written_to(folder):
    (folder / "nsa_jax").write_text("a file where the folder should be")
    process = Process()
    assert process("a")[3].binary == process("a")[3].binary == "ptx of a"
    assert process.compiled == ["a", "a"]


def test_kernels_of_others_are_left_alone(folder):
    process = Process()
    for _ in range(2):
        process("a", module="nsa_jax_kernels.selected")
    assert process.compiled == ["a", "a"]
    assert not list(folder.iterdir())


def test_dumps_are_of_kernels_that_were_compiled(folder):
    Process()("a")
    process = Process(_JAX_TRITON_DUMP_DIR="somewhere")
    process("a")
    assert process.compiled == ["a"]


def test_off_unless_jax_has_a_cache(set_folder):
    set_folder(None)
    process = Process()
    assert process("a")[3].binary == "ptx of a"
    assert process.compiled == ["a"]


LOWERED = """
import sys, jax, jax.numpy as jnp, nsa_jax
from jax_triton import triton_lib
if sys.argv[1:] == ["found"]:
    triton_lib.compile_ttir_inplace = None
query, key = (jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16) for heads in (16, 1))
def attend(query, key):
    return nsa_jax.sliding_window_attention(query, key, key, window_size=512, implementation="triton")
print(jax.jit(attend).trace(query, key).lower(lowering_platforms=("cuda",)).as_text())
"""


@pytest.mark.parametrize("capability", ["80", "90"])  # a kernel in Triton's language, one in Gluon
def test_another_process_lowers_the_same_program(tmp_path, capability):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "NSA_JAX_COMPUTE_CAPABILITY": capability}
    made = lowering.script("-c", LOWERED, **environment)
    assert "triton_kernel_call" in made
    assert lowering.script("-c", LOWERED, "found", **environment) == made
    with pytest.raises(AssertionError, match="'NoneType' object is not callable"):
        lowering.script("-c", LOWERED, "found", **environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")})
