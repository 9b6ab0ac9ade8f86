"""`bnjax report`: the file it writes, and what it says of what it cannot read."""

import re
import shutil

import pytest


def test_a_report(trained, run, tmp_path):
    output = tmp_path / "report.html"
    runs = trained("digits"), trained("images")
    printed = run("report", *runs, "--output", output, "--accuracy", "0.2", "0.99")
    size = output.stat().st_size
    assert printed == f"{output}: 2 runs, {size:,} bytes\n"
    assert size < 300_000
    page = output.read_text()
    for text in (
        "20.00 %",
        "99.00 %",
        "--data.name",
        "bn_1: its numbers",
    ):
        assert text in page


def test_nothing_is_overwritten(trained, fails, run, tmp_path):
    output = tmp_path / "report.html"
    output.write_text("mine")
    given = ("report", trained("digits"), "--no-doctor", "--output", output)
    assert "exists already" in fails(*given, status=2)
    assert output.read_text() == "mine"
    run(*given, "--force")
    assert "no-doctor" in output.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is given"),
        (["{run}", "--accuracy", "95"], "--accuracy 95: expected .* mean 0.95?"),
        (["{run}", "--accuracy", "0"], "--accuracy 0: expected more than 0"),
        (["{run}", "--layers", "norm_*"], "--layers norm_\\*: .* bn_0, bn_1"),
    ],
)
def test_mistakes(trained, fails, tmp_path, words, message):
    words = [word.format(run=trained("digits")) for word in words]
    found = fails("report", *words, "--output", tmp_path / "r.html", status=2)
    assert re.search(message, found)
    assert not (tmp_path / "r.html").exists()


def test_what_is_no_run(fails, tmp_path):
    found = fails("report", tmp_path, "--output", tmp_path / "r.html")
    assert "is not a run: it has no config.json" in found


def test_a_run_without_checkpoints_or_data_is_reported(trained, run, tmp_path):
    output = tmp_path / "report.html"
    bare = tmp_path / "bare"
    shutil.copytree(trained("digits"), bare)
    shutil.rmtree(bare / "checkpoints")
    run("report", bare, "--output", output)
    page = output.read_text()
    assert "bare was not examined:" in page
    assert "has no checkpoints" in page
