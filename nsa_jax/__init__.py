"""Native Sparse Attention for JAX (Yuan et al. 2025, arXiv 2502.11089).

Letters in shapes:
    B: rows of the batch.
    T: tokens in a row.
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
from nsa_jax.compressed import compressed_attention
from nsa_jax.compression import compress, gather_windows
from nsa_jax.residuals import CHECKPOINT_NAMES
from nsa_jax.segments import segment_ids_from_cu_seqlens
from nsa_jax.selected import selected_attention
from nsa_jax.selection import select_blocks
from nsa_jax.sliding import sliding_window_attention

__all__ = [
    "CHECKPOINT_NAMES",
    "compress",
    "compressed_attention",
    "gather_windows",
    "native_sparse_attention",
    "segment_ids_from_cu_seqlens",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
