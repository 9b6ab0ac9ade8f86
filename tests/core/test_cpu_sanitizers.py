import pytest

from tests.core import sanitize


@pytest.mark.slow
def test_the_sanitizers_find_nothing(capsys):
    found = sanitize.main()
    said = capsys.readouterr().out
    assert not found, said
    if "clean" not in said:
        pytest.skip(said)
