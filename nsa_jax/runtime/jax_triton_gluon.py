"""What jax_triton 0.4 lacks for kernels written in Gluon, Triton's lower level.

It makes their code but would send it through the passes of Triton's own language, and it launches as many warps as the
kernel's first partition has, while the others of `gluon.language.warp_specialize` need warps too. And it takes kernels
that are launched in clusters to be written for that, all their layouts spread over a cluster's programs.
"""

import atexit
import copy
import gc
import re
import sys


def install(triton_lib) -> None:
    """Makes jax_triton's module `triton_lib` compile and launch Gluon kernels."""
    compile_kernel = triton_lib.compile_ttir_inplace

    def compile_either(module, backend, options, gpu_target):
        # the code of Triton's language has no layouts yet, so nothing that tells of warps
        is_gluon = module.get_int_attr("ttg.num-warps") is not None
        return compile_kernel(module, _for_gluon(backend) if is_gluon else backend, options, gpu_target)

    triton_lib.compile_ttir_inplace = compile_either
    atexit.register(_let_go)
    if triton_lib.triton_kernel_call_lib is not None:  # a jaxlib that cannot launch kernels
        triton_lib.triton_kernel_call_lib = _KernelLibrary(triton_lib.triton_kernel_call_lib)


def _let_go() -> None:
    """Takes apart, when the process ends, what Triton 3.9 holds for ever once a Gluon kernel was compiled.

    Through the classes of Gluon's layouts that is all of its compiler, which nanobind would report, line by line, as
    leaked.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("triton.experimental.gluon"):
            vars(module).clear()
    gc.collect()


def warps(ptx: str, partition: int) -> int:
    """The warps of a launch: as many as the PTX requires, or else those of the one partition there is."""
    required = re.search(r"\.reqntid (\d+)", ptx)
    return int(required[1]) // 32 if required else partition


def programs_of_cluster(ptx: str) -> int:
    """How many programs run as one cluster: two where they wait for each other (kernels/sm90/pairs.py)."""
    return 2 if "barrier.cluster" in ptx else 1


def _for_gluon(backend):
    """A backend of Triton whose passes up to TritonGPU code are those for Gluon."""
    backend = copy.copy(backend)
    backend.make_ttir = lambda module, *_: module
    backend.make_ttgir = backend.gluon_to_ttgir
    return backend


class _KernelLibrary:
    """jaxlib's module of Triton kernels, launched with the warps and in the clusters that their PTX requires."""

    def __init__(self, library):
        self._library = library

    def TritonKernel(self, name, num_warps, num_ctas, shared, binary, *rest):
        cluster = max(num_ctas, programs_of_cluster(binary))
        return self._library.TritonKernel(name, warps(binary, num_warps), cluster, shared, binary, *rest)

    def __getattr__(self, name):
        return getattr(self._library, name)
