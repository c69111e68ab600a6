"""The sizes that a kernel is compiled for, as one value that it passes on to its functions.

Both hold in Triton, in Gluon and in Triton's interpreter. A kernel builds one from its constants in its first line.
Aggregates have no methods in Triton's interpreter: what portable kernels do with one is a function that takes it.
"""

import triton
import triton.language as tl


@triton.aggregate
class Shape:
    """Sizes of the arrays: query [B, T, H * G, K], key [B, C, H, K], value [B, C, H, V].

    Attributes:
        T: queries of a batch row.
        C: keys of a batch row.
        H: kv heads.
        G: query heads of a kv head.
        K, V: key and value width.
        SCALE: factor on the scores.
    """

    T: tl.constexpr
    C: tl.constexpr
    H: tl.constexpr
    G: tl.constexpr
    K: tl.constexpr
    V: tl.constexpr
    SCALE: tl.constexpr


@triton.aggregate
class PortableShape(Shape):
    """A `Shape`, and how the portable kernels load and multiply tiles of it.

    Attributes:
        K_PARTS, V_PARTS: powers of two into which the widths are cut, see tiles.py.
        PRECISION: of float32 products, Triton's `input_precision`.
        DESCRIPTORS: whether keys (in key passes: queries and cotangents) are tensor descriptors, not pointers.
    """

    K_PARTS: tl.tuple
    V_PARTS: tl.tuple
    PRECISION: tl.constexpr
    DESCRIPTORS: tl.constexpr
