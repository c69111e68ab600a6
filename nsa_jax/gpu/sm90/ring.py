"""How many slots the rings of kernels/sm90/ have: as many as fit."""

from nsa_jax import tiling

_BARRIERS = 1024  # bytes of shared memory that barriers and the like take


def stages(slot: int, *, beside: int = 0, most: int = 12, programs: int = 1) -> int:
    """Slots of a ring.

    Args:
        slot: bytes of one.
        beside: bytes of shared memory that the program needs beside the ring.
        most: beyond which more slots gain nothing.
        programs: that share a multiprocessor.
    """
    room = 1024 * (tiling.SHARED_MEMORY[90] // programs) - _BARRIERS - beside
    return min(most, room // slot)
