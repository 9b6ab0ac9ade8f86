"""A table: which array of a PyTorch model is which of a Flax model."""

import dataclasses

from bnjax.interop.torch_layers import Leaf

COUNTER = "num_batches_tracked"
HEADER = ("PyTorch", "shape", "bnjax", "shape", "layout", "by")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An array here and there.

    Args:
        leaf: of the Flax model.
        name: in the state dict.
        by: "shape": no other layer has arrays like these; "order": others have;
            "given": by the caller; "name": the name was made for it.
        bias: where the leaf is the mean of a normalization, the name of the bias of
            the layer before it, which has none here and is subtracted; else "".
    """

    leaf: Leaf
    name: str
    by: str
    bias: str = ""

    @property
    def path(self) -> str:
        """The path in the variables, "params/conv1/kernel"."""
        return "/".join(map(str, self.leaf.path))


@dataclasses.dataclass(frozen=True)
class NameMapping:
    """Which array is which; printed, a table.

    Args:
        pairs: in the order of the state dict.
        counters: PyTorch's names that end in num_batches_tracked.
        ignored: names of the state dict that go nowhere.
        kept: paths of arrays that keep their values.
    """

    pairs: tuple[Pair, ...]
    counters: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [HEADER]
        for pair in self.pairs:
            leaf = pair.leaf
            shapes = str(leaf.torch_shape), str(leaf.shape)
            layout = str(leaf.layout) or "as it is"
            rows.append((pair.name, shapes[0], pair.path, shapes[1], layout, pair.by))
            if pair.bias:
                less = (pair.bias, shapes[0], pair.path, shapes[1], "subtracted")
                rows.append((*less, pair.by))
        rows += [(name, "", "", "", "ignored", "given") for name in self.ignored]
        rows += [("", "", path, "", "kept", "given") for path in self.kept]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)
