"""Runs kernels on the CPU, in Triton's interpreter.

Environment:
    TRITON_INTERPRET=1: kernels are interpreted. Read when they are first imported.
"""

import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.runtime import host_call

Array = jax.Array


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


_lock = threading.Lock()  # the interpreter patches triton.language while it runs


def run(
    kernel,
    arrays: Sequence[Array],
    block_shapes: Sequence[tuple[int, ...] | None],
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    constants: dict,
) -> list[Array]:
    """The kernel in Triton's interpreter, bfloat16 held as float32 (its bfloat16 products are wrong).

    Args:
        kernel: an interpreted kernel.
        arrays: one per input.
        block_shapes: per input, the shape of the blocks of its tensor descriptor; None for a pointer.
        outputs: shape and dtype per output.
        programs: size of the grid.
        constants: the kernel's constexprs by name.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    def widened(dtype):
        return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)

    def interpret(inputs, filled):
        inputs = [np.ascontiguousarray(x, widened(x.dtype)) for x in inputs]
        operands = [
            _Tensor(x)
            if block_shape is None
            else TensorDescriptor(_Tensor(x), list(x.shape), [s // x.itemsize for s in x.strides], list(block_shape))
            for x, block_shape in zip(inputs, block_shapes, strict=True)
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
        with _lock, np.errstate(all="ignore"):
            kernel[(programs,)](*operands, *map(_Tensor, results), **constants)
        for out, result in zip(filled, results, strict=True):
            out[...] = result

    return host_call.call(interpret, outputs, *arrays)
