"""What became of each batch normalization."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one application of a batch normalization.

    Attributes:
        path: of the layer, as in the variables.
        folded: whether it is gone.
        into: the path of the kernel it went into; empty if it did not.
        operation: what that kernel does, such as "convolution".
        reason: why it could not be folded; empty if it was.
    """

    path: str
    folded: bool
    into: str = ""
    operation: str = ""
    reason: str = ""


class Report(tuple[Layer, ...]):
    """What became of each batch normalization, in the order they are computed.

    Printed, it is a table.
    """

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("batch normalization", "folded into", "as", "or why not")]
        rows += [
            (row.path, row.into or "-", row.operation or "-", row.reason)
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        )
