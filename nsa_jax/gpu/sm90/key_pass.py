"""What launches of the passes from the keys' side share on Hopper: sizes of kernels/sm90/key_pass.py."""

from nsa_jax.gpu.sm90 import ring

REGISTERS = 128  # a thread has no more, so that two programs share a multiprocessor
_STATISTICS = 12  # bytes of a row's statistics


def stages(key_width: int, value_width: int) -> int:
    """Slots of the ring, for elements of two bytes."""
    from nsa_jax.kernels.sm90.key_pass import KEYS, ROWS

    row = 2 * (key_width + value_width)
    return ring.stages(ROWS.value * (row + _STATISTICS), beside=KEYS.value * row, most=4, programs=2)
