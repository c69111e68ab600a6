"""The sizes that the kernels of the selected branch are compiled for, a value that the caller hands over as a constant.

A frozen dataclass is one constant to Triton, to Gluon and to Triton's interpreter, and its fields and properties are
constants too.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedShape:
    """Sizes of query [B, T, H * G, K], key [B, C, H, K] and value [B, C, H, V].

    Attributes:
        T: queries of a batch row.
        C: keys of a batch row.
        H: key heads.
        G: query heads of a key head.
        K, V: width of keys and of values.
        SCALE: factor on the scores.
        BLOCK: keys of a block.
        KEYS: keys of a tile; a block is PIECES such tiles.
    """

    T: int
    C: int
    H: int
    G: int
    K: int
    V: int
    SCALE: float
    BLOCK: int
    KEYS: int

    @property
    def N(self) -> int:
        return self.H * self.G

    @property
    def PIECES(self) -> int:
        return self.BLOCK // self.KEYS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemsShape(SelectedShape):
    """For passes that go through `inverse.Items`.

    Attributes:
        BLOCKS: most blocks of a batch row.
        ITEMS: most items of a batch row and head.
        MORE: most of them that are not a block's first.
        PROGRAMS: programs that go through them.
    """

    BLOCKS: int
    ITEMS: int
    MORE: int
    PROGRAMS: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortableShape(SelectedShape):
    """What the portable kernels have beside that.

    Attributes:
        WINDOW: keys of the sliding window; 0 for none.
        ROWS: query rows, (token, head of the group) pairs, of a tile.
        K_PARTS, V_PARTS: widths of the tiles that hold keys and values, see tiles.py.
        PRECISION: of float32 products.
    """

    WINDOW: int
    ROWS: int
    K_PARTS: tuple[int, ...]
    V_PARTS: tuple[int, ...]
    PRECISION: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryShape(PortableShape):
    """For the passes of selected.py.

    Attributes:
        TOKENS: tokens of a tile.
        ENTRIES: most blocks of a walk.
        AHEAD: whether a loop looks up its next block at the end of the step before.
    """

    TOKENS: int
    ENTRIES: int
    AHEAD: bool

    @property
    def TILES(self) -> int:
        return -(-self.T // self.TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyShape(PortableShape, ItemsShape):
    """For the pass of selected_keys.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedShape(SelectedShape):
    """For the passes of sm90/selected.py.

    Attributes:
        TOKENS: tokens of a unit.
        ENTRIES: most blocks of a unit's walk.
        TOGETHER: tokens of a warpgroup that must want a block for its warps to multiply it together.
        TILES: pairs of units of a batch row and head.
        UNITS: pairs of units in all.
        PROGRAMS: pairs of programs.
        STAGES: slots of the ring.
    """

    TOKENS: int
    ENTRIES: int
    TOGETHER: int
    TILES: int
    UNITS: int
    PROGRAMS: int
    STAGES: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyRingShape(ItemsShape):
    """For the pass of sm90/selected_keys.py.

    Attributes:
        STAGES: slots of the ring.
    """

    STAGES: int
