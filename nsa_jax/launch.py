"""The one place that starts Triton kernels: on a GPU through jax_triton, on a CPU in Triton's interpreter.

Environment:
    NSA_JAX_COMPUTE_CAPABILITY: the architecture to compile for (80, 90, ...) where no GPU is present; 90 unless set.
        Read when a function is traced.
    TRITON_INTERPRET=1: kernels run on the CPU in Triton's interpreter. Read when the kernels are first imported.
"""

import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from nsa_jax import compile_ahead, gluon, kernel_cache, tiling

Array = jax.Array

_INSTALL = "install nsa-jax on Linux with its extra cuda13 or cuda12"


def triton_missing() -> str | None:
    """What keeps Triton kernels from being built here, or None."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; {_INSTALL}" if missing else None


def on_nvidia_gpu() -> bool:
    """Whether arrays go to an NVIDIA GPU unless placed elsewhere."""
    device = jax.config.jax_default_device
    platform = device if isinstance(device, str) else device.platform if device else jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return False
    return "rocm" not in getattr(jax.devices("gpu")[0].client, "platform_version", "").lower()


@functools.cache
def _gpu_capability() -> int:
    major, minor = jax.devices("gpu")[0].compute_capability.split(".")
    return 10 * int(major) + int(minor)


def compute_capability() -> int:
    """The compute capability that kernels are compiled for: the GPU's, else NSA_JAX_COMPUTE_CAPABILITY, else 90."""
    asked = os.environ.get("NSA_JAX_COMPUTE_CAPABILITY")
    if asked is None:
        return _gpu_capability() if jax.default_backend() == "gpu" else 90
    if not asked.isdigit() or int(asked) < 80:
        raise ValueError(f"NSA_JAX_COMPUTE_CAPABILITY: expected a number such as 80 or 90, got {asked!r}")
    return int(asked)


def multiprocessors() -> int:
    """Multiprocessors of the GPU; those of an H100 where no GPU is present."""
    cores = getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
    return cores or 132


def capability_of(kernel) -> int:
    """The compute capability that `kernel` will run on; 0 in Triton's interpreter."""
    return 0 if _is_interpreted(kernel) else compute_capability()


_PTX_VERSIONS = {100: 86, 101: 86, 120: 87, 103: 88, 121: 88}
_OLDEST_PTX_VERSION, _NEWEST_PTX_VERSION = 80, 90
_DESCRIPTOR_PTX_VERSION = 86  # CUDA 12.7


def ptx_version(capability: int, descriptors: bool = False) -> int:
    """The lowest PTX version that knows what is used: the ptxas of the CUDA that JAX uses must accept it.

    Args:
        capability: of the architecture.
        descriptors: whether the kernel reads through tensor descriptors.
    """
    version = _OLDEST_PTX_VERSION if capability <= 90 else _PTX_VERSIONS.get(capability, _NEWEST_PTX_VERSION)
    return max(version, _DESCRIPTOR_PTX_VERSION) if descriptors else version


def dot_precision() -> str:
    """How float32 products are done: exactly, or as jax.default_matmul_precision says."""
    asked = str(jax.config.jax_default_matmul_precision).lower()
    return {"tensorfloat32": "tf32", "high": "tf32", "tf32_tf32_f32": "tf32", "tf32_tf32_f32_x3": "tf32x3"}.get(
        asked, "ieee"
    )


def varying_axes(arrays) -> tuple[str, ...]:
    """The mesh axes of an enclosing shard_map over which any array of a pytree varies."""
    axes = set()
    for array in jax.tree.leaves(arrays):
        axes |= jax.typeof(array).manual_axis_type.varying
    return tuple(sorted(axes))


def vary_together(arrays):
    """A pytree of arrays, each varying over every mesh axis that one of them varies over (shard_map's check_vma).

    A custom_vjp must see its arguments so: the cotangents it gives then vary like them, and JAX sums them where needed.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda array: _vary(array, axes), arrays)


def _vary(array: Array, axes: tuple[str, ...]) -> Array:
    lacking = tuple(axis for axis in axes if axis not in jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, lacking, to="varying") if lacking else array


def fold_vmap(function: Callable) -> Callable:
    """`function` of arrays [B, ...], giving arrays [B, ...], under jax.vmap: the mapped axis is folded into B."""

    @jax.custom_batching.custom_vmap
    def folded(*arrays):
        return function(*arrays)

    @folded.def_vmap
    def rule(axis_size, in_batched, *arrays):
        def merge(array, batched):
            array = array if batched else jnp.broadcast_to(array[None], (axis_size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        outputs = folded(*map(merge, arrays, in_batched))
        split = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outputs)
        return split, jax.tree.map(lambda _: True, outputs)

    return folded


class Tiled(NamedTuple):
    """An array that a kernel reads through a tensor descriptor, in blocks of this shape.

    Attributes:
        array: any array.
        block_shape: sides of a block, one per axis.
        swizzled: whether the kernel is written in Gluon, where a descriptor tells how blocks lie in shared memory: as
            products want them, rows of at least 128 bytes in a swizzle of 128.
        axes: the order in which the kernel sees the array's axes; None for as they are.
    """

    array: Array
    block_shape: tuple[int, ...]
    swizzled: bool = False
    axes: tuple[int, ...] | None = None


def key_tiles(kernel, keys: int, *arrays: Array) -> tuple[Array | Tiled, ...]:
    """Arrays [B, C, H, D], Tiled in blocks of `keys` of one head where the kernel can read them so on its device."""
    if tiling.descriptors(capability_of(kernel), [x.shape[3] for x in arrays]):
        return tuple(Tiled(x, (1, keys, 1, x.shape[3])) for x in arrays)
    return arrays


def query_tiles(kernel, rows: int, group: int, *arrays: Array) -> tuple[Array | Tiled, ...]:
    """Arrays [B, T, N, D], Tiled in blocks of `rows` (token, head of the group) pairs where the kernel can."""
    fits = rows % group == 0 and group == tiling.power_of_two(group)
    if fits and tiling.descriptors(capability_of(kernel), [x.shape[3] for x in arrays]):
        return tuple(Tiled(x, (1, rows // group, group, x.shape[3])) for x in arrays)
    return arrays


def row_pieces(x: Array, group: int) -> Tiled:
    """x [B, T, N, D] as the kernels for Hopper copy queries: 64 columns of 64 (token, head of the group) pairs."""
    heads = min(group, 64)
    return Tiled(x, (1, 64 // heads, heads, 64), swizzled=True)


def neighbour_pieces(x: Array, group: int, tokens: int, heads: int) -> Tiled:
    """x [B, T, N, D] as kernels/selection_hopper.py copies queries: 64 columns of the group's first so many heads of so
    many tokens, then of the next heads, and so on."""
    B, T, N, D = x.shape
    pieces = x.reshape(B, T, N // heads, heads, D)
    return Tiled(pieces, (1, group // heads, tokens, heads, 64), swizzled=True, axes=(0, 2, 1, 3, 4))


def token_pieces(x: Array, group: int) -> Tiled:
    """x [B, T, N, D] as the kernels for Hopper gather tokens: 64 columns of up to 64 heads of one token's group."""
    return Tiled(x, (1, 1, min(group, 64), 64), swizzled=True)


def key_pieces(x: Array, keys: int = 64) -> Tiled:
    """x [B, C, H, D] as the kernels for Hopper copy keys: all columns of so many keys of one head."""
    return Tiled(x.reshape(*x.shape[:2], -1), (1, keys, x.shape[3]), swizzled=True)


def launch(
    kernel,
    *arrays: Array | Tiled,
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    warps: int,
    stages: int,
    flops: int,
    registers: int | None = None,
    **constants,
) -> list[Array]:
    """Runs a Triton kernel.

    Args:
        kernel: a triton.jit function whose parameters are the input pointers, the output pointers, then constexprs.
            The constexpr DESCRIPTORS, if it has one, tells whether it got Tiled arrays.
        *arrays: one array per input pointer, one Tiled per tensor descriptor.
        outputs: shape and dtype per output pointer; the kernel writes every element of those that the caller looks at.
        programs: size of the grid, which has one axis; where programs run in pairs, so many pairs.
        warps, stages: num_warps and num_stages.
        flops: floating-point operations, for profiles.
        registers: most that a thread may have; None for as many as there are.
        **constants: every constexpr of the kernel, by name.

    Returns:
        One array per output.

    Raises:
        TypeError: the arguments are not exactly those of the kernel.
        ValueError: the grid is too large.
    """
    names = list(kernel.arg_names)
    if "DESCRIPTORS" in names:
        constants["DESCRIPTORS"] = _described(arrays)
    pointers = names[: len(arrays) + len(outputs)]
    if set(names[len(pointers) :]) != set(constants):
        wrong = sorted(set(names[len(pointers) :]) ^ set(constants))
        raise TypeError(f"{kernel.__name__}: missing or unknown arguments: {', '.join(wrong)}")
    if programs >= 2**31:
        raise ValueError(f"{kernel.__name__}: {programs} programs, more than the 2^31 - 1 a launch can have")
    if programs == 0:
        return [jnp.zeros(out.shape, out.dtype) for out in outputs]

    axes = varying_axes(_plain(arrays))
    if _is_interpreted(kernel):
        results = _interpret(kernel, arrays, outputs, programs, constants)
    else:
        results = _compile(kernel, arrays, outputs, programs, warps, stages, flops, registers, constants)
    return [_vary(result, axes) for result in results]


def _plain(arrays) -> list[Array]:
    return [x.array if isinstance(x, Tiled) else x for x in arrays]


def _described(arrays) -> bool:
    return any(isinstance(x, Tiled) for x in arrays)


def _is_interpreted(kernel) -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


def _compile(kernel, arrays, outputs, programs, warps, stages, flops, registers, constants):
    jax_triton = _jax_triton()
    capability = compute_capability()
    traffic = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*_plain(arrays), *outputs))
    operands = [_descriptor(x) if isinstance(x, Tiled) else x for x in arrays]
    call = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        out_type=list(outputs),
        grid=(programs,),
        name=f"nsa_{kernel.__name__}",
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        backend_options={
            "ptx_version": ptx_version(capability, _described(arrays)),
            "enable_fp_fusion": True,
            "maxnreg": registers,
        },
        cost_estimate={"flops": int(flops), "bytes_accessed": int(traffic)},
        **constants,
    )
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    leaves, tree = jax.tree.flatten(structs)
    options = capability, warps, stages, registers
    key = kernel, options, tuple(leaves), tree, tuple(outputs), tuple(sorted(constants.items()))
    compile_ahead.note(key, lambda: _compile_alone(call, structs))
    return call(*operands)


def _compile_alone(call, structs) -> None:
    """Compiles a launch by itself. XLA keeps ptxas' part, and so does not do it again in the program that launches.

    Whether there will be such a program is not known here: a function that is only exported pays for it too.
    """
    lowered = jax.jit(call).trace(*structs).lower(lowering_platforms=("cuda",))
    if jax.default_backend() == "gpu" and compute_capability() == _gpu_capability():
        with compile_ahead.aside():
            lowered.compile()


def _descriptor(tiled: Tiled):
    layout = None
    if tiled.swizzled:
        from triton.experimental.gluon.language import NVMMASharedLayout

        layout = NVMMASharedLayout(128, 8 * tiled.array.dtype.itemsize, len(tiled.block_shape))
    shape = tiled.array.shape
    axes = tiled.axes or range(len(shape))
    return _jax_triton().TensorDescriptor(
        tiled.array, tuple(shape[i] for i in axes), tuple(math.prod(shape[i + 1 :]) for i in axes), tiled.block_shape,
        layout,
    )  # fmt: skip


_setup_lock = threading.Lock()


def _jax_triton():
    """jax_triton that knows Gluon, compiles side by side, keeps kernels on disk, and says why CPUs have none."""
    with _setup_lock:  # what is changed in it is changed once, whichever thread is first
        return _set_up()


@functools.cache
def _set_up():
    import jax_triton
    from jax_triton import triton_lib

    def refuse(ctx, *args, **kwargs):
        raise RuntimeError(
            "implementation='triton': the computation was placed on a CPU, and these kernels need an NVIDIA GPU"
            f" ({_INSTALL}); use implementation='xla', or set TRITON_INTERPRET=1 before nsa_jax is imported"
            " to run them in Triton's interpreter"
        )

    def lower(ctx, *args, **kwargs):
        compile_ahead.finish()
        return triton_lib.triton_kernel_call_lowering(triton_lib.make_cuda_target, ctx, *args, **kwargs)

    mlir.register_lowering(triton_lib.triton_kernel_call_p, refuse, platform="cpu")
    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")
    gluon.install(triton_lib)
    compile_ahead.install(triton_lib)
    kernel_cache.install(triton_lib)
    return jax_triton


class _Tensor:
    """A numpy array in the guise of the tensors that Triton's interpreter takes."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array[:0])

    def set_(self, source, *_):
        self.array, self.dtype = source.array, source.dtype

    def cpu(self):
        return self

    def copy_(self, _):
        """Nothing to do: the interpreter has written to this very memory."""

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


_interpreter_lock = threading.Lock()  # the interpreter patches triton.language while it runs


def _interpret(kernel, arrays, outputs, programs, constants):
    """The kernel in Triton's interpreter, bfloat16 held as float32 (its bfloat16 products are wrong)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def widened(dtype):
        return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)

    def run(*inputs):
        inputs = [np.ascontiguousarray(x, widened(x.dtype)) for x in inputs]
        operands = [
            TensorDescriptor(_Tensor(x), list(x.shape), [s // x.itemsize for s in x.strides], list(y.block_shape))
            if isinstance(y, Tiled)
            else _Tensor(x)
            for x, y in zip(inputs, arrays, strict=True)
        ]
        # poison: a kernel that leaves an element unwritten must not pass for one that writes zero
        results = [
            np.full(
                out.shape,
                np.nan if jnp.issubdtype(out.dtype, jnp.inexact) else np.iinfo(out.dtype).min,
                widened(out.dtype),
            )
            for out in outputs
        ]
        with _interpreter_lock, np.errstate(all="ignore"):
            kernel[(programs,)](*operands, *map(_Tensor, results), **constants)
        return [result.astype(out.dtype) for result, out in zip(results, outputs, strict=True)]

    return jax.pure_callback(run, list(outputs), *_plain(arrays))
