"""The attention layer: projections and gates around `nsa_jax.layers.attention`."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from nsa_jax.layers.attention import BRANCHES, attend, branches_in_use
from nsa_jax.layers.decode import LayerState, attend_next, init_state
from nsa_jax.linen.cache_variable import cache_variable
from nsa_jax.linen.compression import MLPCompression
from nsa_jax.linen.projections import HEADS, KV_HEADS, Projections

Array = jax.Array


class NativeSparseAttention(Projections):
    """Native Sparse Attention over packed rows, in the manner of `nn.MultiHeadDotProductAttention`.

    Every gate is the sigmoid of a projection of the input, one per query head and branch. Positions restart at each
    segment. A mean is taken of rotated keys, so that a compressed score is the mean of the window's own scores; a
    learned map sees keys before rotation, the same wherever the window stands, and what it gives is rotated to the
    window's last token.

    Fields are those of `Projections` and:

    Attributes:
        block_size: tokens of a selection block, a power of two from 16 to 128.
        block_counts: S, blocks that each query selects.
        window_size: tokens seen by the sliding branch, the query's own included; 0 drops the branch.
        compression: "mean"; "mlp", the paper's phi (`MLPCompression`); or a module from [B, C, l, H, D] to
            [B, C, H, D], of which keys and values get a copy each.
        compression_window, compression_stride: l and d; block_size unless given.
        num_init_blocks, num_local_blocks: blocks selected always.
        branches: those in use.
        separate_keys: whether each branch has keys and values of its own (the paper's) or all share them.
        implementation: "triton", "xla", or None to choose by device.

    Source: Yuan et al. 2025, arXiv 2502.11089, section 3.
    """

    block_size: int = 64
    block_counts: int = 16
    window_size: int = 512
    compression: str | nn.Module = "mean"
    compression_window: int | None = None
    compression_stride: int | None = None
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    branches: tuple[str, ...] = BRANCHES
    separate_keys: bool = False
    implementation: Literal["triton", "xla"] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
        state: LayerState | None = None,
    ) -> Array | tuple[Array, LayerState]:
        """The layer's output.

        Args:
            x: [B, T, features].
            segment_ids: integers [B, T], or None for one segment per row; negative is padding. None in decoding, where
                a row is one segment.
            lengths: in decoding, integers [B], how many of the tokens belong to each row; all unless given.
            state: what the layer has seen (`init_state`), where the caller keeps it in place of a collection.

        Returns:
            [B, T, out_features]; on padding the bias of the last projection, 0 without one; in decoding NaN for tokens
            that the cache has no room for. With a state also the next one.

        Raises:
            ValueError, TypeError: a field is out of range or contradicts another, or x, segment_ids or lengths has a
                wrong shape or dtype.
        """
        segment_ids, tokens = self.positions(x, segment_ids)
        features = x.shape[-1]
        kv_heads, width, value_width = self.widths(features)
        branches = branches_in_use(self)
        copies, copy_axes = ((len(branches),), ("branches",)) if self.separate_keys else ((), ())

        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (*copies, kv_heads, width), (*copy_axes, *KV_HEADS))(x)
        value = self.project("value", (*copies, kv_heads, value_width), (*copy_axes, *KV_HEADS))(x)
        gate = nn.sigmoid(self.project("gate", (len(branches), self.num_heads), ("branches", "heads"))(x))
        maps = None if self.compression == "mean" else (self._map("compress_key"), self._map("compress_value"))
        init = functools.partial(self.init_state, *x.shape[:2], features, key.dtype)
        variable, seen = cache_variable(self, init, segment_ids, lengths, state)
        if seen is None:
            output = attend(self, query, key, value, gate, tokens=tokens, segment_ids=segment_ids, maps=maps)
            return self.project_out(features)(output)
        output, seen = attend_next(self, seen, query, key, value, gate, lengths=lengths, maps=maps)
        output = self.project_out(features)(output)
        if variable is None:
            return output, seen
        variable.value = seen
        return output

    def init_state(
        self, batch: int, capacity: int, features: int, dtype: jnp.dtype, *, num_layers: int = 1
    ) -> LayerState:
        """The state of a layer, or of several, that has seen nothing, with room for `capacity` tokens a row."""
        learned = self.compression != "mean"
        return init_state(self, batch, capacity, self.widths(features), dtype, learned=learned, num_layers=num_layers)

    def _map(self, name: str) -> nn.Module:
        if isinstance(self.compression, nn.Module):
            return self.compression.clone(parent=self, name=name)
        if self.compression == "mlp":
            return MLPCompression(
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )
        raise ValueError(f"compression: expected 'mean', 'mlp' or a linen module, got {self.compression!r}")
