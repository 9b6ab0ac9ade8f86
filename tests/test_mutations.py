"""The mutations fit the code. To try them, `python -m tests.mutations`."""

import collections

import pytest

from tests.mutations import MUTATIONS, ROOT


def test_names_differ():
    counts = collections.Counter(mutation.name for mutation in MUTATIONS)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_is_there_once(mutation):
    """And what becomes of it is something else, of the language of the file."""
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.line) == 1
    mutated = source.replace(mutation.line, mutation.becomes)
    assert mutated != source
    if mutation.file.endswith(".py"):
        compile(mutated, mutation.file, "exec")


@pytest.mark.parametrize("tests", sorted({mutation.tests for mutation in MUTATIONS}))
def test_the_tests_are_there(tests):
    file, _, name = tests.partition("::")
    source = (ROOT / file).read_text()
    assert not name or f"\ndef {name.partition('[')[0]}(" in source
