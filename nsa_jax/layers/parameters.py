"""Whether given parameters are those that a model has."""

from collections.abc import Mapping


def match(name: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Compares shapes by name.

    Args:
        name: the argument that the given ones came in.
        expected, given: shapes by parameter name.

    Raises:
        ValueError: a parameter is missing, not expected, or of another shape. Names the first few of each.
    """
    missing = sorted(set(expected) - set(given))
    unexpected = sorted(set(given) - set(expected))
    shapes = [
        f"{key} expected {list(expected[key])}, got {list(given[key])}"
        for key in sorted(set(expected) & set(given))
        if tuple(expected[key]) != tuple(given[key])
    ]
    faults = [
        f"{what} {_first_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape:", shapes))
        if names
    ]
    if faults:
        raise ValueError(f"{name}: {'; '.join(faults)}")


def _first_few(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
