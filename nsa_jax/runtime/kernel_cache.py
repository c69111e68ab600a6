"""Compiled Triton kernels on disk, in the folder of JAX's persistent compilation cache.

Triton compiles while JAX lowers, before JAX looks into its own cache, which therefore spares a second process only the
part of XLA. With `jax_compilation_cache_dir` set, what Triton makes of this package's kernels is kept there too, under
`nsa_jax/`, and found by their sources: Triton need not make its first code of them, most of a second process's work.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile

import jax

from nsa_jax import kernels
from nsa_jax.runtime import jax_triton_gluon


def install(triton_lib) -> None:
    """Makes jax_triton's module `triton_lib` look for compiled kernels on disk, and leave them there."""
    compile_kernel = triton_lib.TritonFunction._compile_kernel
    _sources()  # now, while the files are those that were imported

    def cached(self, spec, gpu_target, backend, backend_options):
        folder = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
        ours = self.fn.fn.__module__.startswith(f"{kernels.__name__}.")
        if not folder or not ours or triton_lib._JAX_TRITON_DUMP_DIR:
            return compile_kernel(self, spec, gpu_target, backend, backend_options)
        options = backend.parse_options(backend_options)
        path = pathlib.Path(folder) / "nsa_jax" / f"{_key(self.fn, spec, gpu_target, options)}.json"
        if known := _read(path, triton_lib.CompilationResult):
            ttir, result = known
            return _kernel(triton_lib, ttir, result, gpu_target, backend_options), ttir, options, result
        kernel, ttir, options, result = compile_kernel(self, spec, gpu_target, backend, backend_options)
        _write(path, ttir, result)
        return kernel, ttir, options, result

    triton_lib.TritonFunction._compile_kernel = cached


def _key(kernel, spec, gpu_target, options) -> str:
    """What the PTX depends on. Triton's own key of a kernel leaves out plain functions, which run while it compiles."""
    from triton.runtime.jit import get_cache_invalidating_env_vars

    switches = repr(sorted(get_cache_invalidating_env_vars().items()))
    parts = (*_versions(), _sources(), switches, kernel.cache_key, repr(spec), repr(gpu_target), options.hash())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """A digest of the sources of all kernels, and of how those in Gluon are compiled."""
    files = sorted(path for folder in kernels.__path__ for path in pathlib.Path(folder).rglob("*.py"))
    files.append(pathlib.Path(jax_triton_gluon.__file__))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(importlib.metadata.version(name) for name in ("triton", "jax-triton"))


def _kernel(triton_lib, ttir, result, gpu_target, backend_options):
    """The kernel that jax_triton makes of a compilation result; ttir too is part of JAX's own cache's key."""
    scratch = (result.global_scratch_size, result.global_scratch_align)
    return triton_lib.triton_kernel_call_lib.TritonKernel(
        result.name,
        backend_options["num_warps"],
        backend_options["num_ctas"],
        result.shared_mem_bytes,
        result.binary,
        ttir,
        gpu_target.arch,
        *(scratch if result.global_scratch_size is not None else ()),
    )


def _read(path: pathlib.Path, kind):
    """(ttir, the compilation result) in a file; None if there is none, or none that can be read."""
    try:
        fields = json.loads(path.read_text())
        return fields.pop("ttir"), kind(**fields)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _write(path: pathlib.Path, ttir: str, result) -> None:
    """Keeps what a launch needs, not the code between; a folder that cannot be written to costs only time."""
    fields = {"ttir": ttir} | dataclasses.asdict(dataclasses.replace(result, ttgir="", llir=""))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(fields, file)
        os.replace(file.name, path)
    except OSError:
        return
