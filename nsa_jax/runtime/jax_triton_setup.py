"""Changes jax_triton to what this package needs: Gluon, many kernels compiled at once and kept on disk, plain errors.

The changes fit jax_triton 0.4, which pyproject.toml therefore pins.
"""

import functools
import threading

from jax.interpreters import mlir

from nsa_jax.runtime import compile_ahead, device, jax_triton_gluon, kernel_cache

_lock = threading.Lock()


def load():
    """The module jax_triton, changed as this package needs it, once whichever thread is first."""
    with _lock:
        return _set_up()


@functools.cache
def _set_up():
    import jax_triton
    from jax_triton import triton_lib

    def refuse(ctx, *args, **kwargs):
        raise RuntimeError(
            "implementation='triton': the computation was placed on a CPU, and these kernels need an NVIDIA GPU"
            f" ({device.HOW_TO_INSTALL}); use implementation='xla', or set TRITON_INTERPRET=1 before nsa_jax is"
            " imported to run them in Triton's interpreter"
        )

    def lower(ctx, *args, **kwargs):
        compile_ahead.finish()
        return triton_lib.triton_kernel_call_lowering(triton_lib.make_cuda_target, ctx, *args, **kwargs)

    def keep(used_outs, *others):  # jax 0.12 passes (live_ins, eqn), 0.11 passes (eqn)
        eqn = others[-1]
        return [True] * len(eqn.invars), eqn

    triton_lib.pe.dce_rules[triton_lib.triton_kernel_call_p] = keep
    mlir.register_lowering(triton_lib.triton_kernel_call_p, refuse, platform="cpu")
    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")
    jax_triton_gluon.install(triton_lib)
    compile_ahead.install(triton_lib)
    kernel_cache.install(triton_lib)
    return jax_triton
