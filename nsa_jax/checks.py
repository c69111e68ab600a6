"""Argument checks of the public ops: a ValueError, or a TypeError for a wrong type, says what was expected and came.

They look at shapes, dtypes and Python values only, so they run when a function is traced. Letters as in the package
docstring.
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.runtime import device

Array = jax.Array

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
MOST_WIDTH = 256
BLOCK_SIZES = (16, 32, 64, 128)
IMPLEMENTATIONS = (None, "triton", "xla")


def attention_arrays(query: Array, key: Array, value: Array | None, *, prefix: str = "", stride: int = 1) -> None:
    """Query [B, T, N, K], key [B, T // stride, H, K], value [B, T // stride, H, V], one float dtype, N a multiple of H.

    Args:
        query, key, value: the arrays; value None where the op takes none.
        prefix: of the names "key" and "value" in messages.
        stride: tokens from one key to the next.
    """
    _shape("query", query, ("B", "T", "N", "K"))
    B, T, N, K = query.shape
    if T < 1 or N < 1:
        raise ValueError(f"query: expected at least one token and one head, got {list(query.shape)}")
    _width("query", query, "K")
    _shape(f"{prefix}key", key, (B, T // stride, "H", K))
    H = key.shape[2]
    if H < 1 or N % H:
        raise ValueError(f"query: expected N heads, a multiple of the H = {H} heads of {prefix}key, got N = {N}")
    if value is not None:
        _shape(f"{prefix}value", value, (B, T // stride, H, "V"))
        _width(f"{prefix}value", value, "V")
    _float("query", query)
    for name, array in ((f"{prefix}key", key), (f"{prefix}value", value)):
        if array is not None and array.dtype != query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {array.dtype}")


def gate(name: str, array: Array, query: Array) -> None:
    """A gate [B, T, N] of a float dtype."""
    _shape(name, array, query.shape[:3])
    _float(name, array)


def lse(array: Array, query: Array) -> None:
    """A log-sum-exp, float32 [B, T, N]."""
    _shape("lse", array, query.shape[:3])
    if array.dtype != jnp.float32:
        raise TypeError(f"lse: expected dtype float32, got {array.dtype}")


def segment_ids(array: Array | None, query: Array) -> Array | None:
    """Segment ids [B, T] as int32, or None."""
    return None if array is None else _integers("segment_ids", array, query.shape[:2])


def block_indices(array: Array, query: Array, key: Array) -> Array:
    """Block indices [B, T, H, S] as int32."""
    return _integers("block_indices", array, (*query.shape[:2], key.shape[2], "S"))


def block_counts(counts: int | Array, query: Array, key: Array) -> int | Array:
    """Block counts, an int >= 0, or [B, T, H] as int32."""
    if isinstance(counts, numbers.Integral):
        return _integer("block_counts", counts, 0)
    return _integers("block_counts", counts, (*query.shape[:2], key.shape[2]))


def block_size(size: int) -> int:
    """A power of two from 16 to 128."""
    size = _integer("block_size", size, 1)
    if size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, got {size}")
    return size


def windows(
    window: int, stride: int, block_size: int | None = None, *, names: tuple[str, str] = ("window", "stride")
) -> tuple[int, int]:
    """Window and stride: positive, the stride divides the window and the block size, the window is at most a block.

    Args:
        window, stride: in tokens.
        block_size: in tokens, already checked; None where the op takes none.
        names: of the two arguments, in messages.
    """
    window, stride = _integer(names[0], window, 1), _integer(names[1], stride, 1)
    if window % stride:
        raise ValueError(f"{names[1]}: expected a divisor of {names[0]} = {window}, got {stride}")
    if block_size is not None and block_size % stride:
        raise ValueError(f"{names[1]}: expected a divisor of block_size = {block_size}, got {stride}")
    if block_size is not None and window > block_size:
        raise ValueError(f"{names[0]}: expected at most block_size = {block_size}, got {window}")
    return window, stride


def window_size(size: int) -> int:
    """Tokens a query sees in the sliding branch, its own included; 0 drops the branch."""
    return _integer("window_size", size, 0)


def forced_blocks(num_init_blocks: int, num_local_blocks: int) -> tuple[int, int]:
    """Blocks always taken: any number of first ones, and at least the query's own."""
    return _integer("num_init_blocks", num_init_blocks, 0), _integer("num_local_blocks", num_local_blocks, 1)


def max_block_count(count: int) -> int:
    """S, the most blocks a query selects."""
    return _integer("max_block_count", count, 0)


def scale(factor: float | None, query: Array) -> float:
    """The factor on the scores as a float, K ** -0.5 for None."""
    if factor is None:
        return query.shape[-1] ** -0.5
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
        raise TypeError(
            f"scale: expected a Python number or None, got {_kind(factor)};"
            " the kernels take it at compile time, so multiply query by a traced scale instead"
        )
    if not math.isfinite(factor):
        raise ValueError(f"scale: expected a finite number, got {factor}")
    return float(factor)


def resolve_implementation(implementation: str | None) -> str:
    """What runs, "triton" or "xla"; for None Triton where it is installed and arrays go to an NVIDIA GPU, else jnp.

    Raises:
        ValueError: the implementation is unknown.
        ImportError: "triton" was asked for, and Triton or jax-triton is not installed.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected None, 'triton' or 'xla', got {implementation!r}")
    missing = device.triton_missing()
    if implementation == "triton" and missing:
        raise ImportError(f"implementation='triton': {missing}")
    if implementation is None:
        return "triton" if device.on_nvidia_gpu() and not missing else "xla"
    return implementation


def _kind(value) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def _shape(name: str, array: Array, expected: tuple[int | str, ...]) -> None:
    """`expected` holds a size, or a letter where any size will do, per axis."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{name}: expected an array, got {_kind(array)}")
    matches = array.ndim == len(expected) and all(
        isinstance(size, str) or size == got for size, got in zip(expected, array.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(array.shape)}")


def _float(name: str, array: Array) -> None:
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype bfloat16, float16 or float32, got {array.dtype}")


def _width(name: str, array: Array, letter: str) -> None:
    width = array.shape[-1]
    if width % 4 or not 4 <= width <= MOST_WIDTH:
        raise ValueError(f"{name}: expected {letter} to be a multiple of 4 from 4 to {MOST_WIDTH}, got {width}")


def _integers(name: str, array: Array, shape: tuple[int | str, ...]) -> Array:
    _shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer dtype, got {array.dtype}")
    return jnp.asarray(array, jnp.int32)


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {_kind(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
