"""The one place that starts Triton kernels: on a GPU through jax_triton, on a CPU in Triton's interpreter."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.runtime.device import capability_of, compute_capability, gpu_capability, is_interpreted, ptx_version
from nsa_jax.runtime.transforms import vary, varying_axes

Array = jax.Array


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
    """x [B, T, N, D] as kernels/sm90/select_blocks.py copies queries: 64 columns of the group's first so many heads of
    so many tokens, then of the next heads, and so on."""
    B, T, N, D = x.shape
    pieces = x.reshape(B, T, N // heads, heads, D)
    return Tiled(pieces, (1, group // heads, tokens, heads, 64), swizzled=True, axes=(0, 2, 1, 3, 4))


def token_pieces(x: Array, group: int) -> Tiled:
    """x [B, T, N, D] as the kernels for Hopper gather tokens: 64 columns of up to 64 heads of one token's group."""
    return Tiled(x, (1, 1, min(group, 64), 64), swizzled=True)


def key_pieces(x: Array, keys: int = 64) -> Tiled:
    """x [B, C, H, D] as the kernels for Hopper copy keys: all columns of so many keys of one head."""
    return Tiled(x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]), (1, keys, x.shape[3]), swizzled=True)


def launch(
    kernel,
    *arrays: Array | Tiled,
    name: str,
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
        name: the branch and the pass, such as "sliding_forward"; profiles show it behind "nsa_".
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
    if is_interpreted(kernel):
        from nsa_jax.runtime import interpreter

        block_shapes = [x.block_shape if isinstance(x, Tiled) else None for x in arrays]
        results = interpreter.run(kernel, _plain(arrays), block_shapes, outputs, programs, constants)
    else:
        results = _compile(kernel, name, arrays, outputs, programs, warps, stages, flops, registers, constants)
    return [vary(result, axes) for result in results]


def _plain(arrays) -> list[Array]:
    return [x.array if isinstance(x, Tiled) else x for x in arrays]


def _described(arrays) -> bool:
    return any(isinstance(x, Tiled) for x in arrays)


def _compile(kernel, name, arrays, outputs, programs, warps, stages, flops, registers, constants):
    from nsa_jax.runtime import compile_ahead, jax_triton_setup

    jax_triton = jax_triton_setup.load()
    capability = compute_capability()
    traffic = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*_plain(arrays), *outputs))
    operands = [_descriptor(jax_triton, x) if isinstance(x, Tiled) else x for x in arrays]
    call = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        out_type=list(outputs),
        grid=(programs,),
        name=f"nsa_{name}",
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
    from nsa_jax.runtime import compile_ahead

    lowered = jax.jit(call).trace(*structs).lower(lowering_platforms=("cuda",))
    if jax.default_backend() == "gpu" and compute_capability() == gpu_capability():
        with compile_ahead.aside():
            lowered.compile()


def _descriptor(jax_triton, tiled: Tiled):
    layout = None
    if tiled.swizzled:
        from triton.experimental.gluon.language import NVMMASharedLayout

        layout = NVMMASharedLayout(128, 8 * tiled.array.dtype.itemsize, len(tiled.block_shape))
    axes = tiled.axes or range(tiled.array.ndim)
    shape, strides = tiled.array.shape, [math.prod(tiled.array.shape[i + 1 :]) for i in range(tiled.array.ndim)]
    sides = tuple(shape[i] for i in axes), tuple(strides[i] for i in axes)
    return jax_triton.TensorDescriptor(tiled.array, *sides, tiled.block_shape, layout)
