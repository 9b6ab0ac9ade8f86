"""Read the figures of a compiled program from its text.

`parse` reads the text of `compiled.as_text()`, and `figures` counts in it. Most figures
are of ENTRY, the computation that the device runs from top to bottom: one of its
operations is one kernel, or one call of a library. The figures are:

- cycles: the compiler's estimate, `estimated_cycles`, in the fusions of a TPU program.
- traffic: the bytes that operations read and write, each operand and each result once.
  A fusion reads only the elements that it needs: if it slices out a row, it reads the
  row. Operations that move no data (tuples, bitcasts) do not count. Operations that
  bring the operands of the next operation to fast memory (a TPU's `copy-start` and
  `slice-start`) do not count either. The memory in which an array lies does not matter.
- fusions: the fusions of ENTRY, and those that read an array of at least a given size.
- fused sums: fusions of ENTRY with sums fused into their main operation
  (`kind=kOutput`, a convolution). Beside an array they write two or more float32
  vectors with one value for each of its channels.
- convolutions, and calls of libraries by name: in the whole program.
- collectives: in the whole program, with the bytes of the operands of one device.
- control flow: branches, loops and calls of ENTRY. No other figure counts their bodies.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
CONTROL_FLOW = ("call", "conditional", "while")
_STILL = {
    *CONTROL_FLOW,
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
}
_SLICES = ("dynamic-slice", "gather", "slice")
_PREFETCHES = ("copy-start", "copy-done", "slice-start", "slice-done")
# A TPU's parts of an array, prefetched one by one, are one array in place.
_JOINS = 'custom_call_target="ConcatBitcast"'


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type.

    Args:
        dtype: as HLO writes it, such as "bf16".
        shape: of the array.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding; 0 for a token."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
        return self.size * width // 8


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation.

    Args:
        name: without its "%".
        opcode: such as "fusion".
        arrays: the result; those of a tuple in order, however it is nested.
        operands: names of operations of the same computation.
        attributes: the text after the operands; that of a parameter or a constant opens
            with its number or value.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> int:
        """Number of elements of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, where there is one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def fusion_kind(self) -> str | None:
        """Such as "kLoop", of a fusion."""
        found = re.search(r"\bkind=(\w+)", self.attributes)
        return found[1] if found and self.opcode == "fusion" else None

    @property
    def called(self) -> str:
        """Name of the computation, of a fusion; else empty."""
        found = re.search(r"\bcalls=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def call_target(self) -> str:
        """Name of the function, of a custom call; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Args:
        entry: name of the computation that runs.
        computations: operations by name, by name of the computation.
    """

    entry: str
    computations: dict[str, dict[str, Operation]]

    @property
    def main(self) -> Sequence[Operation]:
        """Operations of ENTRY, in the order of the text."""
        return tuple(self.computations[self.entry].values())

    def operands(self, operation: Operation) -> list[Operation]:
        """Return the operations of ENTRY that one of them reads."""
        main = self.computations[self.entry]
        return [main[name] for name in operation.operands]


def figures(text: str, array_bytes: int) -> dict[str, Any]:
    """Return what the docstring of this module lists.

    Args:
        text: a compiled program's.
        array_bytes: size from which on an array is one that batch normalization reads.
    """
    module = parse(text)
    everything = [
        operation
        for computation in module.computations.values()
        for operation in computation.values()
    ]
    calls = Counter(
        operation.call_target
        for operation in everything
        if operation.opcode == "custom-call" and _JOINS not in operation.attributes
    )
    opcodes = Counter(operation.opcode for operation in everything)
    library = sum(count for target, count in calls.items() if "conv" in target.lower())
    return {
        "cycles": cycles(module),
        "traffic_bytes": traffic(module),
        "fusions": sum(operation.opcode == "fusion" for operation in module.main),
        "readers": len(readers(module, array_bytes)),
        "fused_sums": len(fused_sums(module)),
        "convolutions": opcodes["convolution"] + library,
        "library_calls": dict(sorted(calls.items())),
        "control_flow": sum(
            operation.opcode in CONTROL_FLOW for operation in module.main
        ),
        "collectives": collectives(module),
    }


def cycles(module: Module) -> int | None:
    """Return the estimated cycles of ENTRY; None where the compiler has none."""
    found = [
        operation.cycles for operation in module.main if operation.cycles is not None
    ]
    return sum(found) if found else None


def traffic(module: Module) -> int:
    """Return the bytes that the operations of ENTRY read and write."""
    return sum(_moved(module, operation) for operation in module.main)


def _moved(module: Module, operation: Operation) -> int:
    opcode = operation.opcode
    if opcode in _STILL or opcode in _PREFETCHES or _JOINS in operation.attributes:
        return 0
    if opcode.endswith("-done"):
        return operation.bytes
    operands = module.operands(operation)
    if opcode == "fusion":
        shares = needed(module, operation)
        read = sum(
            round(share * operand.bytes)
            for share, operand in zip(shares, operands, strict=True)
        )
    else:
        read = sum(operand.bytes for operand in operands)
    # What runs beside other operations is written where it is done.
    return read if opcode.endswith("-start") else read + operation.bytes


def needed(module: Module, fusion: Operation) -> list[float]:
    """Return the share of its elements that a fusion needs of each operand."""
    inside = module.computations[fusion.called]
    needs: dict[str, int] = dict.fromkeys(inside, 0)
    shares: dict[int, float] = {}
    for operation in reversed(inside.values()):
        # Nothing in a fusion is left over: what is not used is its result.
        need = min(needs[operation.name] or operation.size, operation.size)
        for place, name in enumerate(operation.operands):
            whole = inside[name].size
            sliced = operation.opcode in _SLICES and place == 0
            needs[name] += need if sliced or whole == operation.size else whole
        if operation.opcode == "parameter":
            number = int(operation.attributes.partition(",")[0])
            shares[number] = need / operation.size if operation.size else 0.0
    return [shares[number] for number in range(len(fusion.operands))]


def readers(module: Module, array_bytes: int) -> list[Operation]:
    """Return the fusions of ENTRY that read an array of `array_bytes` or more."""
    return [
        operation
        for operation in module.main
        if operation.opcode == "fusion"
        and any(
            array.bytes >= array_bytes
            for operand in module.operands(operation)
            for array in operand.arrays
        )
    ]


def fused_sums(module: Module) -> list[Operation]:
    """Return the fusions of ENTRY that write an array and sums over its batch."""
    found = []
    for operation in module.main:
        vectors = Counter(array for array in operation.arrays if len(array.shape) == 1)
        channels = {
            array.shape[-1] for array in operation.arrays if len(array.shape) > 1
        }
        if operation.fusion_kind == "kOutput" and any(
            vectors[Array("f32", (size,))] >= 2 for size in channels
        ):
            found.append(operation)
    return found


def collectives(module: Module) -> dict[str, int]:
    """Count the collectives of a program, and the bytes of their operands."""
    count = size = 0
    for computation in module.computations.values():
        for operation in computation.values():
            if operation.opcode.removesuffix("-start") in COLLECTIVES:
                count += 1
                size += sum(computation[name].bytes for name in operation.operands)
    return {"count": count, "bytes": size}


def parse(text: str) -> Module:
    """Read the text of a compiled program.

    Raises:
        ValueError: it has no ENTRY, or a line that is no operation.
    """
    entry, computations = None, {}
    current: dict[str, Operation] | None = None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif line.strip():
            operation = _operation(line)
            current[operation.name] = operation
    if entry is None:
        raise ValueError(
            "no ENTRY in the text; expected that of a compiled program, as_text()."
        )
    return Module(entry, computations)


def _operation(line: str) -> Operation:
    """Read `ROOT? %name = type opcode(operands), attributes`."""
    text = re.sub(r"/\*.*?\*/", "", line).strip().removeprefix("ROOT ")
    name, is_operation, rest = text.partition(" = ")
    if not is_operation:
        raise ValueError(f"not an operation of HLO: {line[:200]!r}")
    result, rest = _split_word(rest)
    opcode, _, _ = rest.partition("(")
    operands, attributes = _split_word(rest[len(opcode) :])
    names: tuple[str, ...] = ()
    if opcode in ("constant", "parameter"):
        attributes = f"{operands[1:-1]}, {attributes}"
    else:
        # Some versions write an operand's type before its name.
        names = tuple(part.split()[-1].lstrip("%") for part in _parts(operands[1:-1]))
    return Operation(name.lstrip("%"), opcode, tuple(arrays(result)), names, attributes)


def arrays(result: str) -> Iterator[Array]:
    """Read a result's type, such as `(f32[8]{0}, (bf16[2,8]{1,0}, pred[]))`."""
    # A layout has digits and parentheses of its own: {1,0:T(8,128)(2,1)S(1)}.
    for dtype, sizes in re.findall(
        r"([a-z]\w*)\[([^\]]*)\]", re.sub(r"{[^}]*}", "", result)
    ):
        # A size that is known when the program runs alone is written `<=8`.
        shape = (int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield Array(dtype, tuple(shape))


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no brackets."""
    parts, start, depth = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _split_word(text: str) -> tuple[str, str]:
    """Split where the first word ends, which is as long as its brackets are open."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter in " ,":
            return text[:at], text[at + 1 :].strip()
    return text, ""
