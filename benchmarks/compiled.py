"""What a compiled program says of itself: how many kernels it launches, and how much memory it needs."""

import re

# of the instructions, those that launch nothing; copies between buffers do
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|partition-id|replica-id"
    r"|opt-barrier|add-dependency|.*-done"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_INNER = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def kernels(hlo: str) -> int:
    """Instructions of an optimised HLO module that launch device work.

    Each counts once: the body of a loop too, and a library call or sort that launches several kernels of its own.
    """
    launches: dict[str, int] = {}
    inner: set[str] = set()
    name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
            launches[name] = 0
        elif (instruction := _INSTRUCTION.match(line)) and name:
            opcode = instruction[1]
            if opcode != "call":
                inner |= set(_INNER.findall(line))
            launches[name] += _FREE.fullmatch(opcode) is None
    return sum(count for computation, count in launches.items() if computation not in inner)


def facts(compiled) -> dict[str, int | None]:
    """kernels, and temp_bytes: memory beyond arguments and results; None where the backend does not tell."""
    try:
        memory = compiled.memory_analysis()
    except Exception:  # a backend may not implement it, and says so in its own way
        memory = None
    return {"kernels": kernels(compiled.as_text()), "temp_bytes": getattr(memory, "temp_size_in_bytes", None)}
