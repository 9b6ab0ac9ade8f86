import dataclasses

import pytest

from bnjax.data.records import Example


@dataclasses.dataclass(frozen=True)
class Damaged:
    """Another split, some of whose rows are damaged."""

    inner: object
    rows: frozenset[int]

    def __len__(self):
        return len(self.inner)

    def read(self, rows):
        return [
            Example(None, 0) if row in self.rows else self.inner.read([row])[0]
            for row in rows
        ]

    def where(self, row):
        return f"file-{row}.jpg"


@pytest.fixture(scope="session")
def damage():
    """Return a source with damaged rows in one of its splits."""

    def change(source, rows, split="test"):
        damaged = Damaged(source.splits[split], frozenset(rows))
        return dataclasses.replace(source, splits={**source.splits, split: damaged})

    return change
