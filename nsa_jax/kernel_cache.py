"""Compiled Triton kernels on disk, in the folder of JAX's persistent compilation cache.

Triton compiles while JAX lowers, before JAX looks into its own cache, which therefore spares a second process only the
part of XLA. With `jax_compilation_cache_dir` set, what Triton makes of a kernel is kept there too, under `nsa_jax/`.
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


def install(triton_lib) -> None:
    """Makes jax_triton's module `triton_lib` look for compiled kernels on disk, and leave them there."""
    compile_kernel = triton_lib.compile_ttir_inplace

    def cached(ttir, backend, options, gpu_target):
        folder = jax.config.jax_compilation_cache_dir
        if not folder or not jax.config.jax_enable_compilation_cache:
            return compile_kernel(ttir, backend, options, gpu_target)
        path = pathlib.Path(folder) / "nsa_jax" / f"{_key(ttir, options, gpu_target)}.json"
        known = _read(path, triton_lib.CompilationResult)
        if known is None:
            known = compile_kernel(ttir, backend, options, gpu_target)
            _write(path, known)
        return known

    triton_lib.compile_ttir_inplace = cached


def _key(ttir, options, gpu_target) -> str:
    """What the PTX depends on, but for the places in source files that it tells."""
    parts = (*_versions(), ttir.str_nodebug(), options.hash(), repr(gpu_target))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(importlib.metadata.version(name) for name in ("triton", "jax-triton"))


def _read(path: pathlib.Path, kind):
    """The compilation result in a file; None if there is none, or none that can be read."""
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: pathlib.Path, result) -> None:
    """Keeps what a launch needs, not the intermediate code; a folder that cannot be written to costs only time."""
    fields = dataclasses.asdict(dataclasses.replace(result, ttgir="", llir=""))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(fields, file)
        os.replace(file.name, path)
    except OSError:
        return
