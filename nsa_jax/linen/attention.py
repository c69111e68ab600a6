"""The attention layer: projections, rotary positions, compression, three branches, gates."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

import nsa_jax
from nsa_jax import checks
from nsa_jax.linen.compression import MLPCompression
from nsa_jax.linen.projections import HEADS, KV_HEADS, Projections
from nsa_jax.linen.rope import rotate
from nsa_jax.rows.windows import window_starts

Array = jax.Array

BRANCHES = ("compressed", "selected", "sliding")


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
    def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
        """The layer's output.

        Args:
            x: [B, T, features].
            segment_ids: integers [B, T], or None for one segment per row; negative is padding.

        Returns:
            [B, T, out_features]; on padding the bias of the last projection, 0 without one.

        Raises:
            ValueError, TypeError: a field is out of range or contradicts another, or x or segment_ids has a wrong shape
                or dtype.
        """
        segment_ids, tokens = self.positions(x, segment_ids)
        features = x.shape[-1]
        kv_heads, width, value_width = self.widths(features)
        branches = self._branches_in_use()
        copies, copy_axes = ((len(branches),), ("branches",)) if self.separate_keys else ((), ())

        query = self.project("query", (self.num_heads, width), HEADS)(x)
        key = self.project("key", (*copies, kv_heads, width), (*copy_axes, *KV_HEADS))(x)
        value = self.project("value", (*copies, kv_heads, value_width), (*copy_axes, *KV_HEADS))(x)
        gate = nn.sigmoid(self.project("gate", (len(branches), self.num_heads), ("branches", "heads"))(x))

        query = self._rotate(query, tokens.position)
        keys, values = self._by_branch(key, branches), self._by_branch(value, branches)
        if self.separate_keys:
            rotated = {branch: self._rotate(keys[branch], tokens.position) for branch in branches}
        else:
            rotated = self._by_branch(self._rotate(key, tokens.position), branches)
        gates = {branch: gate[:, :, i] for i, branch in enumerate(branches)}

        compressed = None, None
        source = next((branch for branch in ("compressed", "selected") if branch in branches), None)
        if source is not None:
            compressed = self._compress(keys[source], rotated[source], values[source], tokens, segment_ids)
        attend = self._attend_separate if self.separate_keys else self._attend_shared
        output = attend(query, rotated, values, *compressed, gates, segment_ids)
        return self.project_out(features)(output)

    @property
    def _sizes(self) -> dict[str, int]:
        """The compression window and stride, as the ops call them."""
        window, stride = (
            self.block_size if size is None else size for size in (self.compression_window, self.compression_stride)
        )
        names = ("compression_window", "compression_stride")
        window, stride = checks.windows(window, stride, checks.block_size(self.block_size), names=names)
        return {"window": window, "stride": stride}

    def _branches_in_use(self) -> tuple[str, ...]:
        unknown = sorted(set(self.branches) - set(BRANCHES))
        if unknown:
            raise ValueError(f"branches: expected some of {BRANCHES}, got {unknown[0]!r}")
        used = tuple(b for b in BRANCHES if b in self.branches and (b != "sliding" or self.window_size > 0))
        if not used:
            raise ValueError(f"branches: none left of {self.branches} with window_size={self.window_size}")
        if self.compression != "mean" and "compressed" not in used:
            raise ValueError("compression: a learned map needs the compressed branch, selection gives it no gradient")
        return used

    def _by_branch(self, x: Array, branches: tuple[str, ...]) -> dict[str, Array]:
        """x [B, T, branches, H, D], or [B, T, H, D] for all of them."""
        return {branch: x[:, :, i] if self.separate_keys else x for i, branch in enumerate(branches)}

    def _rotate(self, x: Array, position: Array) -> Array:
        return x if self.rope_theta is None else rotate(x, position, theta=self.rope_theta)

    def _compress(self, key, rotated, value, tokens, segment_ids) -> tuple[Array, Array]:
        """Compressed keys and values [B, T // d, H, D], of keys before and after rotation and of values."""
        sizes = self._sizes
        if self.compression == "mean":
            return tuple(nsa_jax.compress(x, **sizes, segment_ids=segment_ids) for x in (rotated, value))
        start = window_starts(tokens, **sizes)  # [B, C]
        windows = (nsa_jax.gather_windows(x, **sizes, segment_ids=segment_ids) for x in (key, value))
        maps = (self._map("compress_key"), self._map("compress_value"))
        key, value = (
            jnp.where((start >= 0)[:, :, None, None], phi(x), jnp.zeros((), x.dtype))  # phi(0) need not be 0
            for phi, x in zip(maps, windows, strict=True)
        )
        last = jnp.maximum(start, 0) + sizes["window"] - 1
        position = jnp.take_along_axis(tokens.position, jnp.minimum(last, tokens.position.shape[1] - 1), axis=1)
        return self._rotate(key, position), value

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

    def _attend_shared(self, query, keys, values, compressed_key, compressed_value, gates, segment_ids) -> Array:
        any_branch = next(iter(keys))
        return nsa_jax.native_sparse_attention(
            query,
            keys[any_branch],
            values[any_branch],
            **{f"{branch}_gate": gate for branch, gate in gates.items()},
            block_counts=self.block_counts,
            block_size=self.block_size,
            window_size=self.window_size,
            compression_window=self.compression_window,
            compression_stride=self.compression_stride,
            compressed_key=compressed_key,
            compressed_value=compressed_value,
            num_init_blocks=self.num_init_blocks,
            num_local_blocks=self.num_local_blocks,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _attend_separate(self, query, keys, values, compressed_key, compressed_value, gates, segment_ids) -> Array:
        common = {"segment_ids": segment_ids, "implementation": self.implementation}
        sizes = self._sizes
        outputs = {}
        if compressed_key is not None:
            outputs["compressed"], lse = nsa_jax.compressed_attention(
                query, compressed_key, compressed_value, **sizes, **common, return_residual=True
            )
        if "selected" in gates:
            block_indices = nsa_jax.select_blocks(
                query,
                compressed_key,
                lse,
                block_counts=self.block_counts,
                block_size=self.block_size,
                num_init_blocks=self.num_init_blocks,
                num_local_blocks=self.num_local_blocks,
                **sizes,
                **common,
            )
            outputs["selected"] = nsa_jax.selected_attention(
                query, keys["selected"], values["selected"], block_indices, block_size=self.block_size, **common
            )
        if "sliding" in gates:
            outputs["sliding"] = nsa_jax.sliding_window_attention(
                query, keys["sliding"], values["sliding"], window_size=self.window_size, **common
            )
        return sum(gate[..., None] * outputs[branch] for branch, gate in gates.items())
