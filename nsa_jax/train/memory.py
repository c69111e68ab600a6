"""How much memory there is, and what surely takes more."""

import os

import jax


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(device: jax.Device) -> int:
    """Bytes that JAX may use of a device."""
    return (device.memory_stats() or {}).get("bytes_limit") or host_memory()


def check_fits(what: str, size: int, device: jax.Device) -> None:
    """Raises ValueError if `size` bytes are more than a device has."""
    if size > device_memory(device):
        limit = in_gib(device_memory(device))
        raise ValueError(f"{what} at least {in_gib(size)} of memory, of {limit} on {device.device_kind}")


def in_gib(size: int) -> str:
    """A number of bytes, to be read."""
    return f"{size / 2**30:,.1f} GiB" if size < 2**70 else "more than 10^12 GiB"
