"""The sizes of the kernels of a step, see ../shape.py."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of a step.

    Attributes:
        QUERIES: of a batch row.
        CAPACITY: tokens that a row has room for.
        WITH_LENGTH: whether it is told how many tokens are in each row.
        H: kv heads.
        G: query heads of a kv head.
    """

    QUERIES: int
    CAPACITY: int
    WITH_LENGTH: bool
    H: int
    G: int

    @property
    def R(self) -> int:
        """Query rows of a batch row and kv head."""
        return self.QUERIES * self.G


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedShape(StepShape):
    """A `StepShape`, and which blocks are selected.

    Attributes:
        COUNTED: how block counts are given, see `select_blocks.room_of`.
        S: blocks that a query takes at most.
        BLOCK_SIZE: tokens of a block.
    """

    COUNTED: str
    S: int
    BLOCK_SIZE: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeysShape(StepShape):
    """A `StepShape`, and the tiles of keys and query rows that are multiplied.

    Attributes:
        K, V, K_PARTS, V_PARTS, PRECISION: as in `TileShape`.
        FACTOR: on the scores, for exponents of base 2.
        PAGE, POOL: keys of a page, and how many pages there are, see `cache.locate`.
        ROWS, TILES: query rows of a tile, and such tiles of a group.
        KEYS: of a tile.
    """

    K: int
    V: int
    K_PARTS: tuple[int, ...]
    V_PARTS: tuple[int, ...]
    PRECISION: str
    FACTOR: float
    PAGE: int
    POOL: int
    ROWS: int
    TILES: int
    KEYS: int
