"""Which kernels run: the first of an op's backends, fastest first, that supports the device and the shapes.

A backend is a module per architecture. Those of the interval branches and of the selected branch have the names
`supports`, `forward`, `backward_query` and `backward_key_value` (the latter also `walk`); those of selection
`supports` and `select`. To add one, write the module and put it into the tuple here.
"""

import jax

Array = jax.Array


def interval(query: Array, value: Array, scale: float):
    """The backend of the compressed and of the sliding branch."""
    from nsa_jax.gpu.portable import interval as portable
    from nsa_jax.gpu.sm90 import interval as sm90

    return _first((sm90, portable), query, value, scale)


def selected(query: Array, value: Array, scale: float, block_size: int, window_size: int):
    """The backend of the selected branch; window_size: of the sliding window that it does too, 0 for none."""
    from nsa_jax.gpu.portable import selected as portable
    from nsa_jax.gpu.sm90 import selected as sm90

    return _first((sm90, portable), query, value, scale, block_size, window_size)


def block_selection(query: Array, compressed_key: Array, count: int, windows_per_block: int):
    """The backend of selection of `count` blocks, each of so many strides."""
    from nsa_jax.gpu.portable import block_selection as portable
    from nsa_jax.gpu.sm90 import block_selection as sm90

    return _first((sm90, portable), query, compressed_key, count, windows_per_block)


def _first(backends, *arguments):
    return next(backend for backend in backends if backend.supports(*arguments))
