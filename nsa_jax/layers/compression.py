"""What an MLP compression map sees of a window."""

import jax

Array = jax.Array


def flatten_windows(windows: Array, position: Array) -> Array:
    """[B, C, l, H, D] plus the position embedding [l, D] -> [B, C, H, l * D], the window's tokens side by side."""
    batch, slots, window, heads, width = windows.shape
    windows = windows + position[None, None, :, None, :]
    return windows.transpose(0, 1, 3, 2, 4).reshape(batch, slots, heads, window * width)
