"""Tables of text."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns: the first set left, the others right.

    Args:
        header: a name a column.
        rows: of as many cells each.

    Example:
        >>> print(format_table(("layer", "dead"), [("bn_0", "0"), ("bn_10", "12")]))
        layer  dead
        bn_0      0
        bn_10    12
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (header, *rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
