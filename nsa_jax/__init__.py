"""Native Sparse Attention for JAX (Yuan et al. 2025, arXiv 2502.11089).

Letters in shapes:
    B: rows of the batch.
    T: tokens in a key row.
    Tq: queries in a row; T of them unless query_indices say where they stand.
    N: query heads.
    H: key and value heads, a divisor of N.
    G: query heads that share a key head, N // H.
    K: width of queries and keys.
    V: width of values and outputs.
    C: slots for compression windows in a row, T // stride.
    S: blocks selected by a query.

Everything is relative to a segment: a maximal run of equal `segment_ids` in a row. Negative ids are padding.
"""

from nsa_jax.attention import native_sparse_attention
from nsa_jax.block_selection import select_blocks
from nsa_jax.checkpoint_names import CHECKPOINT_NAMES
from nsa_jax.compressed_branch import compressed_attention
from nsa_jax.compression import compress, gather_windows
from nsa_jax.decode import cached_attention, extend_cache, init_cache
from nsa_jax.rows.cache import KVCache
from nsa_jax.rows.segments import segment_ids_from_cu_seqlens
from nsa_jax.selected_branch import selected_attention
from nsa_jax.sliding_branch import sliding_window_attention

__version__ = "0.2.0"

__all__ = [
    "CHECKPOINT_NAMES",
    "KVCache",
    "cached_attention",
    "compress",
    "compressed_attention",
    "extend_cache",
    "gather_windows",
    "init_cache",
    "native_sparse_attention",
    "segment_ids_from_cu_seqlens",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
