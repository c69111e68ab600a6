"""Python functions called from compiled programs on the CPU, through XLA's foreign function interface.

`jax.pure_callback` does the same but for one thing: it is bound to the module that it is lowered into, and what
`custom_partitioning` lowers for a device is a module of its own. Nor does this turn buffers into JAX arrays, which
waits for devices that may wait for the callback.
"""

import atexit
import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_TARGET = "nsa_jax_host_callback"
_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL_ERROR = 13
_functions: dict[int, Callable] = {}
_lock = threading.Lock()


def call(function: Callable, outputs: Sequence[jax.ShapeDtypeStruct], *arrays: Array) -> list[Array]:
    """The results of a Python function of (inputs, results), lists of NumPy arrays of which it fills the latter."""
    _register()
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]

    def on_buffers(operands, results):
        function(
            [_view(*x) for x in zip(operands, inputs, strict=True)],
            [_view(*x) for x in zip(results, outputs, strict=True)],
        )

    with _lock:
        key = len(_functions)
        _functions[key] = on_buffers
    return jax.ffi.ffi_call(_TARGET, list(outputs))(*arrays, jnp.full((), key, jnp.int32))


def _view(address: int, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    dtype = np.dtype(struct.dtype)
    count = int(np.prod(struct.shape))
    if count == 0:
        return np.zeros(struct.shape, dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(struct.shape)


# Structures of XLA's c_api.h, up to the last field that is used.


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


_CreateError = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", _CreateError),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )

    def addresses(self) -> list[int]:
        return [self.buffers[i].contents.data for i in range(self.size)]


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    )


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handle(pointer) -> int | None:
    frame = pointer.contents
    try:
        if frame.extension and frame.extension.contents.type == _METADATA:
            metadata = ctypes.cast(frame.extension, ctypes.POINTER(_MetadataExtension)).contents.metadata.contents
            metadata.version.major, metadata.version.minor = (
                frame.api.contents.version.major,
                frame.api.contents.version.minor,
            )
            return None
        *operands, key = frame.arguments.addresses()
        _functions[ctypes.c_int32.from_address(key).value](operands, frame.results.addresses())
        return None
    except Exception as error:
        message = f"{type(error).__name__}: {error}".encode()
        arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, _INTERNAL_ERROR)
        return frame.api.contents.create_error(arguments)


@functools.cache
def _register() -> None:
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.cast(_handle, ctypes.c_void_p), None, None)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
    atexit.register(_await_programs)


def _await_programs() -> None:
    """Waits for what runs: a program that calls Python when Python is gone would end the process by an abort."""
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # an error is told where the array is used
            array.block_until_ready()
