"""The sizes that a kernel is compiled for, a value that the launch hands over as one constant, SHAPE.

A frozen dataclass is one constant to Triton, to Gluon and to Triton's interpreter, and its fields and properties are
constants too, in the kernel and in the functions that it passes SHAPE on to. Each kernel derives its own from `Shape`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of query [B, T, N, K], key [B, C, H, K] and value [B, C, H, V].

    Attributes:
        T: queries of a batch row.
        C: keys of a batch row.
        H: kv heads.
        G: query heads of a kv head; N = H * G.
        K, V: key and value width; V is 0 where a kernel takes no values.
        SCALE: factor on the scores.
    """

    T: int
    C: int
    H: int
    G: int
    K: int
    V: int = 0
    SCALE: float

    @property
    def N(self) -> int:
        return self.H * self.G


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileShape(Shape):
    """A `Shape`, and the tiles in which the portable kernels load and multiply.

    Attributes:
        ROWS: query rows of a tile.
        KEYS: keys of a tile.
        K_PARTS, V_PARTS: powers of two into which the widths are cut, see tiles.py.
        PRECISION: of float32 products, Triton's `input_precision`.
    """

    ROWS: int
    KEYS: int
    K_PARTS: tuple[int, ...]
    V_PARTS: tuple[int, ...] = ()
    PRECISION: str
