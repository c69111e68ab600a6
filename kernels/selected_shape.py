"""The sizes that the kernels of the selected branch are compiled for, see shape.py."""

import dataclasses

from .shape import Shape, TileShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedShape(Shape):
    """What all these kernels have.

    Attributes:
        BLOCK: keys of a block.
        KEYS: keys of a tile; a block is PIECES such tiles.
    """

    BLOCK: int
    KEYS: int

    @property
    def PIECES(self) -> int:
        return self.BLOCK // self.KEYS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemsShape(SelectedShape):
    """The sizes of passes that go through `inverse.Items`.

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
class PortableShape(SelectedShape, TileShape):
    """What the portable kernels have beside that.

    Attributes:
        WINDOW: keys of the sliding window; 0 for none.
    """

    WINDOW: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryShape(PortableShape):
    """The sizes of the passes of selected.py.

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
    """The sizes of the pass of selected_keys.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedShape(SelectedShape):
    """The sizes of the passes of sm90/selected.py.

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
    """The sizes of the pass of sm90/selected_keys.py.

    Attributes:
        STAGES: slots of the ring.
    """

    STAGES: int
