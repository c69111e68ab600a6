"""The branches in plain jnp, by reference.py."""

import jax

from nsa_jax import branches, reference
from nsa_jax.branches import Arrays, Config, PerBranch
from nsa_jax.rows.queries import Row

Array = jax.Array


class Reference:
    """The branches of whole rows, see `branches.Implementation`; block_counts: an int, int32 () or [B, Tq, H]."""

    def __init__(self, config: Config, arrays: Arrays, block_counts: int | Array, row: Row):
        self.config, self.arrays, self.block_counts, self.row = config, arrays, block_counts, row
        self.windows = {"window": config.window, "stride": config.stride, "scale": config.scale}

    def compressed(self) -> tuple[Array, Array]:
        query, _, _, key, value = self.arrays
        return reference.compressed_attention(query, key, value, self.row, **self.windows)

    def select(self, lse: Array) -> Array:
        query, _, _, key, _ = self.arrays
        config = self.config
        return reference.select_blocks(
            query,
            key,
            lse,
            self.row,
            block_counts=self.block_counts,
            max_block_count=config.max_block_count,
            block_size=config.block_size,
            num_init_blocks=config.num_init_blocks,
            num_local_blocks=config.num_local_blocks,
            **self.windows,
        )

    def selected(self, block_indices: Array, block_counts: Array | None, lse: Array | None) -> tuple[Array, Array]:
        query, key, value, _, _ = self.arrays
        return reference.selected_attention(
            query,
            key,
            value,
            self.row,
            block_indices,
            block_counts=block_counts,
            block_size=self.config.block_size,
            scale=self.config.scale,
            unclean=None if lse is None else branches.tainted(lse, key.shape[2]),
        )

    def all_selected(self) -> tuple[Array, Array]:
        return self.nearest(self.row.length)

    def sliding(self, outputs: PerBranch) -> tuple[Array, Array]:
        return self.nearest(self.config.window_size)

    def nearest(self, window_size: int) -> tuple[Array, Array]:
        """Output and lse of attention to a sliding window."""
        query, key, value, _, _ = self.arrays
        return reference.sliding_window_attention(
            query, key, value, self.row, window_size=window_size, scale=self.config.scale
        )
