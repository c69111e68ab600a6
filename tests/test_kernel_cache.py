"""Triton's kernels kept on disk: compiled once, found by the next process, made anew where a file is broken."""

import types

import jax
import pytest
from jax_triton.triton_lib import CompilationResult, TensorDescMeta

from nsa_jax import kernel_cache

OPTIONS = types.SimpleNamespace(hash=lambda: "options")


class Compiler:
    """Stands for the module jax_triton.triton_lib of one process, and counts what is compiled."""

    CompilationResult = CompilationResult

    def __init__(self):
        self.compiled = []
        self.compile_ttir_inplace = self.compile
        kernel_cache.install(self)

    def compile(self, ttir, backend, options, gpu_target):
        ttir = ttir.str_nodebug()
        self.compiled.append(ttir)
        meta = [dict.fromkeys(TensorDescMeta.__required_keys__, 1)]
        return CompilationResult(f"ptx of {ttir}", "kernel", 4096, "long", "longer", tensordesc_meta=meta)

    def __call__(self, ttir, target="sm_90"):
        module = types.SimpleNamespace(str_nodebug=lambda: ttir)
        return self.compile_ttir_inplace(module, None, OPTIONS, target)


@pytest.fixture
def set_folder():
    before = jax.config.jax_compilation_cache_dir
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def folder(tmp_path, set_folder):
    set_folder(str(tmp_path))
    return tmp_path


def test_another_process_compiles_nothing(folder):
    first, second = Compiler(), Compiler()
    made, found = first("a"), second("a")
    assert (first.compiled, second.compiled) == (["a"], [])
    assert (found.binary, found.name, found.shared_mem_bytes) == (made.binary, made.name, made.shared_mem_bytes)
    assert found.tensordesc_meta == made.tensordesc_meta
    assert all(path.parent == folder / "nsa_jax" and path.suffix == ".json" for path in folder.rglob("*.*"))


def test_kernels_and_architectures_are_told_apart(folder):
    compiler = Compiler()
    for ttir, target in (("a", "sm_90"), ("b", "sm_90"), ("a", "sm_80"), ("b", "sm_90")):
        assert compiler(ttir, target).binary == f"ptx of {ttir}"
    assert compiler.compiled == ["a", "b", "a"]


@pytest.mark.parametrize("content", ["", '{"binary"', "[1]", '{"binary": "ptx"}'])
def test_broken_file_is_made_anew(folder, content):
    Compiler()("a")
    (path,) = (folder / "nsa_jax").iterdir()
    path.write_text(content)
    second, third = Compiler(), Compiler()
    assert second("a").binary == third("a").binary == "ptx of a"
    assert (second.compiled, third.compiled) == (["a"], [])


def test_folder_that_cannot_be_written_to(folder):
    (folder / "nsa_jax").write_text("a file where the folder should be")
    compiler = Compiler()
    assert compiler("a").binary == compiler("a").binary == "ptx of a"
    assert compiler.compiled == ["a", "a"]


def test_off_unless_jax_has_a_cache(set_folder):
    set_folder(None)
    compiler = Compiler()
    assert compiler("a").binary == "ptx of a"
    assert compiler.compiled == ["a"]
