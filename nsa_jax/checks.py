"""Argument checks of the public ops: a ValueError, or a TypeError for a wrong type, says what was expected and came.

They look at shapes, dtypes and Python values only, so they run when a function is traced. Letters as in the package
docstring.
"""

import math
import numbers
import reprlib

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.runtime import device

Array = jax.Array

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
MOST_WIDTH = 256
MOST_INT = 2**31 - 1  # that a size can be
MOST_TEXT = 120  # characters of a value in a message
BLOCK_SIZES = (16, 32, 64, 128)
IMPLEMENTATIONS = (None, "triton", "xla")


def attention_arrays(query: Array, key: Array, value: Array, keys: int | str, *, prefix: str = "") -> None:
    """As `query_and_key`, and value [B, C, H, V] of the same dtype."""
    query_and_key(query, key, keys, prefix=prefix)
    _shape(f"{prefix}value", value, (*key.shape[:3], "V"))
    _width(f"{prefix}value", value, "V")
    _dtype_of_query(f"{prefix}value", value, query)


def query_and_key(query: Array, key: Array, keys: int | str, *, prefix: str = "") -> None:
    """Query [B, Tq, N, K], key [B, C, H, K] of one float dtype, N a multiple of H.

    Args:
        query, key: the arrays.
        keys: C, or a letter where there may be any number of keys but 0.
        prefix: of the name "key" in messages.
    """
    _shape("query", query, ("B", "Tq", "N", "K"))
    B, Tq, N, K = query.shape
    if Tq < 1 or N < 1:
        raise ValueError(f"query: expected at least one token and one head, got {list(query.shape)}")
    _width("query", query, "K")
    _shape(f"{prefix}key", key, (B, keys, "H", K))
    C, H = key.shape[1:3]
    if isinstance(keys, str) and C < 1:
        raise ValueError(f"{prefix}key: expected at least one token, got {list(key.shape)}")
    if H < 1 or N % H:
        raise ValueError(f"query: expected N heads, a multiple of the H = {H} heads of {prefix}key, got N = {N}")
    _float("query", query)
    _dtype_of_query(f"{prefix}key", key, query)


def query_length(query: Array, query_indices: Array | None) -> int | str:
    """How many keys a row has for all that the queries tell: Tq where each stands at a token, else any number."""
    _shape("query", query, ("B", "Tq", "N", "K"))
    return query.shape[1] if query_indices is None else "T"


def key_length(length: int | None, query: Array, query_indices: Array | None, segment_ids: Array | None) -> int:
    """T, the tokens of the key row, where an op is not given the key row itself."""
    _shape("query", query, ("B", "Tq", "N", "K"))
    if query_indices is not None:
        _integer_array("query_indices", query_indices, query.shape[:2])
    if query_indices is None:
        known, why = query.shape[1], "as many as queries, which stand at one token each without query_indices"
    elif segment_ids is not None:
        _shape("segment_ids", segment_ids, (query.shape[0], "T"))
        known, why = segment_ids.shape[1], "as many as segment_ids"
    else:
        known, why = None, ""
    if length is None:
        if known is None:
            raise ValueError("key_length: expected the tokens of the key row, as query_indices are given, got None")
        return known
    length = integer("key_length", length, 1, MOST_INT)
    if known is not None and length != known:
        raise ValueError(f"key_length: expected {known}, {why}, got {_short(length)}")
    return length


def query_indices(array: Array | None, query: Array) -> Array | None:
    """Query indices [B, Tq] as int32, or None."""
    return None if array is None else _integers("query_indices", array, query.shape[:2])


def gate(name: str, value: Array | float, query: Array) -> Array:
    """A gate [B, Tq, N] of a float dtype; of a number the array [] that holds it."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return np.asarray(_as_float(value), np.float32)
    _shape(name, value, query.shape[:3], "an array, a Python number or None")
    _float(name, value)
    return value


def cache_fits(cache, query: Array) -> None:
    """A query [B, Tq, N, K] with the rows, heads, width and dtype of a checked cache."""
    _shape("query", query, (cache.batch, "Tq", "N", cache.key.shape[-1]))
    Tq, N, _ = query.shape[1:]
    H = cache.key.shape[2]
    if Tq < 1 or N < 1:
        raise ValueError(f"query: expected at least one token and one head, got {list(query.shape)}")
    if N % H:
        raise ValueError(f"query: expected N heads, a multiple of the H = {H} heads of cache, got N = {N}")
    _dtype_of_cache("query", query, cache)


def appended(name: str, array: Array, cache, tokens: int | str, like: Array) -> None:
    """What goes into a checked cache, [B, tokens, H, D], with the heads, width and dtype of its array `like`."""
    _shape(name, array, (cache.batch, tokens, *like.shape[2:]))
    _dtype_of_cache(name, array, cache)
    if isinstance(tokens, str) and array.shape[1] < 1:
        raise ValueError(f"{name}: expected at least one token, got {list(array.shape)}")


def row_lengths(name: str, array: Array, batch: int) -> Array:
    """Numbers of tokens [B] as int32."""
    return _integers(name, array, (batch,))


def page_indices(array: Array | None, batch: int) -> Array:
    """Page numbers [B, J] as int32."""
    return _integers("cache.page_indices", array, (batch, "J"))


def page_size(size: int, block_size: int, capacity: int) -> int:
    """Tokens of a page, a multiple of block_size and a divisor of the capacity."""
    size = integer("page_size", size, 1)
    if size % block_size:
        raise ValueError(f"page_size: expected a multiple of block_size = {block_size}, got {_short(size)}")
    if capacity % size:
        raise ValueError(f"capacity: expected a multiple of page_size = {size}, got {_short(capacity)}")
    return size


def float_dtype(name: str, dtype) -> jnp.dtype:
    """bfloat16, float16 or float32."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {_short(dtype)}")
    return known


def lse(array: Array, query: Array) -> None:
    """A log-sum-exp, float32 [B, Tq, N]."""
    _shape("lse", array, query.shape[:3])
    if array.dtype != jnp.float32:
        raise TypeError(f"lse: expected dtype float32, got {array.dtype}")


def segment_ids(array: Array | None, batch: int, length: int) -> Array | None:
    """Segment ids [B, T] as int32 in which the same tokens begin a segment and the same are padding, or None.

    Ids of other dtypes are numbered anew, since what int32 can't hold must not become equal, or negative.
    """
    if array is None:
        return None
    array = _integer_array("segment_ids", array, (batch, length))
    xp = np if isinstance(array, np.ndarray) else jnp
    if not np.can_cast(array.dtype, np.int32):
        changes = array[:, 1:] != array[:, :-1]
        number = xp.pad(xp.cumsum(changes, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        array = xp.where(array < xp.zeros((), array.dtype), np.int32(-1), number)
    return jnp.asarray(array, jnp.int32)


def block_indices(array: Array, query: Array, key: Array) -> Array:
    """Block indices [B, Tq, H, S] as int32."""
    return _integers("block_indices", array, (*query.shape[:2], key.shape[2], "S"))


def block_counts(counts: int | Array, query: Array, key: Array) -> int | Array:
    """Block counts, an int >= 0, or [B, Tq, H] as int32."""
    if isinstance(counts, numbers.Integral):
        return integer("block_counts", counts, 0)
    return _integers("block_counts", counts, (*query.shape[:2], key.shape[2]), "an int or an array")


def as_int32(counts: int | Array) -> Array:
    """Checked block counts as an int32 array; a number that int32 can't hold means all blocks anyway."""
    return np.asarray(min(counts, MOST_INT), np.int32) if isinstance(counts, int) else counts


def cu_seqlens(array: Array) -> Array:
    """Cumulative lengths [n + 1] or [B, n + 1] as int32."""
    _is_array("cu_seqlens", array)
    if array.ndim not in (1, 2) or array.shape[-1] < 1:
        raise ValueError(f"cu_seqlens: expected shape [n + 1] or [B, n + 1], got {list(array.shape)}")
    return _integers("cu_seqlens", array, array.shape)


def tokens(name: str, x: Array) -> None:
    """x [B, T, H, D] of a float dtype, with at least one token."""
    _shape(name, x, ("B", "T", "H", "D"))
    _float(name, x)
    if x.shape[1] < 1:
        raise ValueError(f"{name}: expected at least one token, got {list(x.shape)}")


def features(name: str, x: Array) -> tuple[int, int, int]:
    """x [B, T, features] of a float dtype; its shape."""
    _shape(name, x, ("B", "T", "features"))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a float dtype, got {x.dtype}")
    return x.shape


def head_width(name: str, width: int) -> int:
    """A width of heads that the ops take."""
    width = integer(name, width, 1)
    if width % 4 or width > MOST_WIDTH:
        raise ValueError(f"{name}: expected a multiple of 4 from 4 to {MOST_WIDTH}, got {_short(width)}")
    return width


def token_ids(name: str, tokens: Array) -> tuple[int, int]:
    """Token numbers [B, T] of an integer dtype; their shape."""
    return _integer_array(name, tokens, ("B", "T")).shape


def block_size(size: int) -> int:
    """A power of two from 16 to 128."""
    size = integer("block_size", size, 1)
    if size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size: expected a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, got {_short(size)}"
        )
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
    window, stride = integer(names[0], window, 1), integer(names[1], stride, 1)
    if window % stride:
        raise ValueError(f"{names[1]}: expected a divisor of {names[0]} = {_short(window)}, got {_short(stride)}")
    if block_size is not None and block_size % stride:
        raise ValueError(f"{names[1]}: expected a divisor of block_size = {block_size}, got {_short(stride)}")
    if block_size is not None and window > block_size:
        raise ValueError(f"{names[0]}: expected at most block_size = {block_size}, got {_short(window)}")
    return window, stride


def window_size(size: int) -> int:
    """Tokens a query sees in the sliding branch, its own included; 0 drops the branch."""
    return integer("window_size", size, 0)


def forced_blocks(num_init_blocks: int, num_local_blocks: int) -> tuple[int, int]:
    """Blocks always taken: any number of first ones, and at least the query's own."""
    return integer("num_init_blocks", num_init_blocks, 0), integer("num_local_blocks", num_local_blocks, 1)


def max_block_count(count: int) -> int:
    """S, the most blocks a query selects."""
    return integer("max_block_count", count, 0)


def scale(factor: float | None, query: Array) -> float:
    """The factor on the scores as a float, K ** -0.5 for None."""
    if factor is None:
        return query.shape[-1] ** -0.5
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
        raise TypeError(
            f"scale: expected a Python number or None, got {_kind(factor)};"
            " the kernels take it at compile time, so multiply query by a traced scale instead"
        )
    number = _as_float(factor)
    if not math.isfinite(number):
        raise ValueError(f"scale: expected a finite number, got {_short(factor)}")
    return number


def resolve_implementation(implementation: str | None) -> str:
    """What runs, "triton" or "xla"; for None Triton where it is installed and arrays go to an NVIDIA GPU, else jnp.

    Raises:
        ValueError: the implementation is unknown.
        ImportError: "triton" was asked for, and Triton or jax-triton is not installed.
    """
    if implementation is not None and not (isinstance(implementation, str) and implementation in IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected None, 'triton' or 'xla', got {_short(implementation)}")
    missing = device.triton_missing()
    if implementation == "triton" and missing:
        raise ImportError(f"implementation='triton': {missing}")
    if implementation is None:
        return "triton" if device.on_nvidia_gpu() and not missing else "xla"
    return implementation


def integer(name: str, value: int, least: int, most: int | None = None) -> int:
    """A Python or NumPy integer from `least` to `most`, as an int."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {_kind(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {_short(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {_short(value)}")
    return int(value)


def _as_float(number: numbers.Real) -> float:
    """The number as a float, infinite where it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _short(value) -> str:
    """The value as text of a length that a message can hold."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 3] + "..."


def _kind(value) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of {value.dtype}{_short(list(value.shape))}"
    return f"{_short(value)} ({kind})"


def _is_array(name: str, array: Array, expected: str = "an array") -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{name}: expected {expected} of JAX or NumPy, got {_kind(array)}")


def _shape(name: str, array: Array, shape: tuple[int | str, ...], expected: str = "an array") -> None:
    """`shape` holds a size, or a letter where any size will do, per axis."""
    _is_array(name, array, expected)
    matches = array.ndim == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, array.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {_short(list(array.shape))}")


def _float(name: str, array: Array) -> None:
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype bfloat16, float16 or float32, got {array.dtype}")


def _dtype_of_query(name: str, array: Array, query: Array) -> None:
    if array.dtype != query.dtype:
        raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {array.dtype}")


def _dtype_of_cache(name: str, array: Array, cache) -> None:
    if array.dtype != cache.key.dtype:
        raise TypeError(f"{name}: expected the dtype of cache, {cache.key.dtype}, got {array.dtype}")


def _width(name: str, array: Array, letter: str) -> None:
    width = array.shape[-1]
    if width % 4 or not 4 <= width <= MOST_WIDTH:
        raise ValueError(f"{name}: expected {letter} to be a multiple of 4 from 4 to {MOST_WIDTH}, got {width}")


def _integer_array(name: str, array: Array, shape: tuple[int | str, ...], expected: str = "an array") -> Array:
    _shape(name, array, shape, expected)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer dtype, got {array.dtype}")
    return array


def _integers(name: str, array: Array, shape: tuple[int | str, ...], expected: str = "an array") -> Array:
    """As int32; what int32 can't hold becomes the nearest number that it can."""
    array = _integer_array(name, array, shape, expected)
    if not np.can_cast(array.dtype, np.int32):
        xp, most, own = np if isinstance(array, np.ndarray) else jnp, np.iinfo(np.int32), jnp.iinfo(array.dtype)
        array = xp.clip(array, array.dtype.type(max(most.min, own.min)), array.dtype.type(most.max))
    return jnp.asarray(array, jnp.int32)
