"""The attention layer as an NNX module: projections and gates around `nsa_jax.layers.attention`."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from nsa_jax import checks
from nsa_jax.layers.attention import BRANCHES, attend, branches_in_use, positions, widths, window_sizes
from nsa_jax.layers.decode import attend_next, init_state
from nsa_jax.nnx.compression import MLPCompression
from nsa_jax.nnx.partitioning import axis_names

Array = jax.Array


class NativeSparseAttention(nnx.Module):
    """Native Sparse Attention over packed rows, in the manner of `nnx.MultiHeadAttention`.

    It computes what `nsa_jax.linen.NativeSparseAttention` computes, bit for bit where the parameters are the same
    (`load_linen`, `to_linen`), with the same names of parameters and of their logical axes. Outside a mesh the names
    are metadata, which `nnx.get_partition_spec` reads. Inside `jax.set_mesh` and `nnx.logical_axis_rules` with a rule
    for each name, parameters are made where the rules say.

    Args:
        num_heads: N, query heads.
        in_features: width of the input.
        num_kv_heads: H, key and value heads; divides N; N unless given.
        head_dim: K, width of queries and keys, even; in_features // N unless given.
        value_dim: V, width of values; K unless given.
        out_features: width of the output; that of the input unless given.
        rope_theta: base of the rotary position embedding, None for none.
        use_bias: whether the projections have biases.
        dtype, param_dtype: of the computation (the inputs' unless given) and of the parameters.
        kernel_init, out_kernel_init, bias_init: initialisers; out_kernel_init is kernel_init unless given.
        block_size: tokens of a selection block, a power of two from 16 to 128.
        block_counts: S, blocks that each query selects.
        window_size: tokens seen by the sliding branch, the query's own included; 0 drops the branch.
        compression: "mean"; "mlp", the paper's phi (`MLPCompression`); or a function of (l, D, rngs=rngs) that makes a
            module from [B, C, l, H, D] to [B, C, H, D], called once for keys and once for values.
        compression_window, compression_stride: l and d; block_size unless given.
        num_init_blocks, num_local_blocks: blocks selected always.
        branches: those in use.
        separate_keys: whether each branch has keys and values of its own (the paper's) or all share them.
        implementation: "triton", "xla", or None to choose by device.
        decode: whether the layer keeps what it has seen, in an `nnx.Cache` that `init_cache` makes, and its input are
            the tokens that come next, any number at a time.
        rngs: has the stream `params`.

    Raises:
        ValueError, TypeError: an argument is out of range or contradicts another.

    Source: Yuan et al. 2025, arXiv 2502.11089, section 3.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        out_features: int | None = None,
        rope_theta: float | None = 10_000.0,
        use_bias: bool = False,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        out_kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        block_size: int = 64,
        block_counts: int = 16,
        window_size: int = 512,
        compression: str | Callable[..., nnx.Module] = "mean",
        compression_window: int | None = None,
        compression_stride: int | None = None,
        num_init_blocks: int = 1,
        num_local_blocks: int = 2,
        branches: Sequence[str] = BRANCHES,
        separate_keys: bool = False,
        implementation: Literal["triton", "xla"] | None = None,
        decode: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.in_features = checks.integer("in_features", in_features, 1)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.rope_theta = rope_theta
        self.block_size = block_size
        self.block_counts = block_counts
        self.window_size = window_size
        self.compression = compression
        self.compression_window = compression_window
        self.compression_stride = compression_stride
        self.num_init_blocks = num_init_blocks
        self.num_local_blocks = num_local_blocks
        self.branches = tuple(branches)
        self.separate_keys = separate_keys
        self.implementation = implementation
        self.decode = decode
        self.cache: nnx.Cache | None = nnx.data(None)

        kv_heads, width, value_width = widths(self, in_features)
        used = branches_in_use(self)
        copies, copy_axes = ((len(used),), ("branches",)) if separate_keys else ((), ())
        numbers = {"dtype": dtype, "param_dtype": param_dtype}
        general = functools.partial(nnx.LinearGeneral, use_bias=use_bias, bias_init=bias_init, **numbers, rngs=rngs)

        def project(shape: tuple[int, ...], *axes: str) -> nnx.LinearGeneral:
            return general(
                in_features,
                shape,
                kernel_init=kernel_init,
                kernel_metadata=axis_names("embed", *axes),
                bias_metadata=axis_names(*axes),
            )

        self.query = project((num_heads, width), "heads", "kv")
        self.key = project((*copies, kv_heads, width), *copy_axes, "kv_heads", "kv")
        self.value = project((*copies, kv_heads, value_width), *copy_axes, "kv_heads", "kv")
        self.gate = project((len(used), num_heads), "branches", "heads")
        if compression != "mean":
            make_map = self._map_maker(kernel_init=kernel_init, bias_init=bias_init, **numbers)
            window = window_sizes(self)["window"]
            self.compress_key = make_map(window, width, rngs=rngs)
            self.compress_value = make_map(window, value_width, rngs=rngs)
        self.out = general(
            (num_heads, value_width),
            out_features or in_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            kernel_metadata=axis_names("heads", "kv", "embed"),
            bias_metadata=axis_names("embed"),
        )

    def __call__(self, x: Array, segment_ids: Array | None = None, *, lengths: Array | None = None) -> Array:
        """The layer's output.

        Args:
            x: [B, T, in_features].
            segment_ids: integers [B, T], or None for one segment per row; negative is padding. None in decoding, where
                a row is one segment.
            lengths: in decoding, integers [B], how many of the tokens belong to each row; all unless given.

        Returns:
            [B, T, out_features]; on padding the bias of the last projection, 0 without one; in decoding NaN for tokens
            that the cache has no room for.

        Raises:
            ValueError, TypeError: x, segment_ids or lengths has a wrong shape or dtype, or in decoding there is no
                cache.
        """
        if lengths is not None and not self.decode:
            raise ValueError("lengths: expected None without decode=True; negative segment_ids are padding")
        if segment_ids is not None and self.decode:
            raise ValueError("segment_ids: expected None in decoding, where a row is one segment")
        if self.decode and self.cache is None:
            raise ValueError("decode: expected a cache, which init_cache makes, got none")
        segment_ids, tokens = positions(x, segment_ids)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [B, T, in_features={self.in_features}], got {list(x.shape)}")
        gate = jax.nn.sigmoid(self.gate(x))
        maps = None if self.compression == "mean" else (self.compress_key, self.compress_value)
        arrays = self.query(x), self.key(x), self.value(x), gate
        if self.decode:
            output, seen = attend_next(self, self.cache.get_value(), *arrays, lengths=lengths, maps=maps)
            self.cache.set_value(seen)
        else:
            output = attend(self, *arrays, tokens=tokens, segment_ids=segment_ids, maps=maps)
        return self.out(output)

    def init_cache(self, input_shape: tuple[int, int, int], dtype: jnp.dtype = jnp.float32) -> None:
        """Makes an empty cache, in place of one that there is.

        Args:
            input_shape: B, the tokens that a row has room for, and in_features.
            dtype: of keys and values.
        """
        batch, capacity, _ = input_shape
        learned, sizes = self.compression != "mean", widths(self, self.in_features)
        self.cache = nnx.Cache(init_state(self, batch, capacity, sizes, dtype, learned=learned))

    def _map_maker(self, **options) -> Callable[..., nnx.Module]:
        if self.compression == "mlp":
            return functools.partial(MLPCompression, **options)
        if callable(self.compression):
            return self.compression
        raise ValueError(
            f"compression: expected 'mean', 'mlp' or a function that makes an NNX module, got {self.compression!r}"
        )
