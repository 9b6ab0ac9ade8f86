"""The report: its numbers by hand, what strangers' runs hold, and in a browser."""

import dataclasses
import functools
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bnjax.data.sources import open_data
from bnjax.doctor import Finding
from bnjax.report import make_report, read_runs
from bnjax.training.config import RunError
from bnjax.training.metrics import read_metrics
from bnjax.training.presets import PRESETS
from bnjax.training.workdir import LAYERS, METRICS, SUMMARY, describe, write_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CONFIG = PRESETS["digits"].config


def write_run(workdir, config=CONFIG, *, rate=50.0, accuracies=(0.5, 0.9), ended=True):
    """Write the folder of a run that evaluated every 100 steps, without checkpoints."""
    workdir.mkdir(parents=True)
    source = open_data(config.data, None)
    write_json(workdir / "config.json", describe("digits", config, source))
    lines, layers = [], []
    for i, accuracy in enumerate(accuracies, 1):
        common = {"step": 100 * i, "loss": 1 - accuracy, "accuracy": accuracy}
        train = {"steps_per_second": rate, "learning_rate": 0.5, "dropped": 0}
        lines.append({**common, **train, "split": "train"})
        lines.append({**common, "split": "test"})
        bn = {"mean": [-1, 0, 1], "var": [1, 2, i], "scale": [1, 1, 1]}
        layers.append({"step": 100 * i, "layers": {"bn_0": bn}, "inputs": {}})
    for name, records in ((METRICS, lines), (LAYERS, layers)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (workdir / name).write_text(text)
    if ended:
        write_json(workdir / SUMMARY, {})
    return workdir


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


def report_of(*workdirs, findings=(), **options):
    return make_report(read_runs(workdirs), [findings] * len(workdirs), **options)


def tables(page, caption):
    """Return the rows of the tables of a caption, as lists of text."""
    found = []
    for after in page.split(f"<caption>{caption}</caption>")[1:]:
        body = ET.fromstring(f"<table>{after.partition('</table>')[0]}</table>")
        found.append([["".join(c.itertext()) for c in r] for r in body.iter("tr")])
    return found


def table(page, caption):
    (found,) = tables(page, caption)
    return found


def test_the_numbers_of_two_runs(tmp_path):
    slow = write_run(tmp_path / "slow", accuracies=(0.5, 0.9, 0.8))
    fast = write_run(tmp_path / "fast", changed(batch_norm=False), rate=200.0)
    page = report_of(slow, fast, accuracies=[0.85])
    assert table(page, "The runs and how they ended") == [
        ["run", "test accuracy", "best", "at step", "test loss", "steps", "time"],
        ["slow", "80.00 %", "90.00 %", "200", "0.2000", "300", "6.0 s"],
        ["fast", "90.00 %", "90.00 %", "200", "0.1000", "200", "1.0 s"],
    ]
    # 100 steps at 50 and at 200 steps a second.
    assert table(page, "Steps, and time of training") == [
        ["run", "85.00 %"],
        ["slow", "200 (4.0 s)"],
        ["fast", "200 (1.0 s)"],
    ]
    assert table(page, "Settings that differ") == [
        ["setting", "slow", "fast"],
        ["--batch-norm", "true", "false"],
    ]
    same = dict(table(page, "Settings that are the same")[1:])
    assert same["--learning-rate"] == "0.1"
    assert same["--seed"] == "0"
    assert tables(page, "test accuracy (%)") == 2 * [
        [
            ["run", "first", "lowest", "highest", "last"],
            ["slow", "50", "50", "90", "80"],
            ["fast", "50", "50", "90", "90"],
        ]
    ]


def test_runs_of_several_seeds(tmp_path):
    seeds = [
        write_run(tmp_path / f"a{n}", changed(seed=n), accuracies=(0.5, best))
        for n, best in enumerate((0.9, 0.7, 0.8))
    ]
    other = write_run(tmp_path / "b", changed(batch_size=30), accuracies=(0.1, 0.6))
    page = report_of(*seeds, other)
    # The least of the best of each group.
    rows = table(page, "Steps, and time of training")
    assert rows[0] == ["run", "60.00 %", "70.00 %"]
    assert [row[2] for row in rows[1:]] == ["200 (4.0 s)"] * 3 + ["not reached"]
    assert "Runs that differ only in their seed have one color" in page
    assert "Runs shown: a0, b." in page
    assert [row[0] for row in table(page, "Running variance")] == [
        "run",
        "a0 and 2 more seeds",
        "b",
    ]


def test_a_run_that_goes_on(tmp_path):
    run = write_run(tmp_path / "now", ended=False)
    for name in (METRICS, LAYERS):
        with (run / name).open("a") as file:
            file.write('{"step": 300, "spl')
    page = report_of(run)
    rows = table(page, "The runs and how they ended")
    assert rows[1][5:] == [f"200 of {CONFIG.steps}, not finished", "4.0 s"]
    assert "Settings that differ" not in page
    new = write_run(tmp_path / "new", ended=False, accuracies=())
    page = report_of(new)
    assert table(page, "The runs and how they ended")[1][1:5] == ["-"] * 4
    assert "There are no measurements yet." in page
    assert "There are no evaluations yet." in page
    assert "These runs have no records or no such layer: new." in page


def test_layers_are_chosen(tmp_path):
    run = write_run(tmp_path / "run")
    lines = read_metrics(run, LAYERS)
    for line in lines:
        line["layers"] = {f"bn_{n}": line["layers"]["bn_0"] for n in range(11)}
    (run / LAYERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = re.findall(r"<h3>(.*?): its numbers</h3>", page := report_of(run))
    assert drawn == ["bn_0", "bn_5", "bn_10"]
    shown = "The charts show 3 of 11 layers; --layers selects others: bn_1, bn_2, bn_3"
    assert shown in page
    page = report_of(run, layers=["bn_1", "*_10"])
    assert re.findall(r"<h3>(.*?): its numbers</h3>", page) == ["bn_1", "bn_10"]


def test_names_that_are_the_same_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / part / "run") for part in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run"]


def test_findings_and_why_there_are_none(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    bad = Finding("rule", "error", "bn_0", {"ratio": 0.25}, "It is.", "Do.")
    page = make_report(read_runs(runs), [(bad,), (), "no data set."])
    rows = table(page, "Findings")
    assert rows[1:] == [["error", "a", "bn_0", "It is. Do.", "ratio 0.25"]]
    assert "b: no finding." in page
    assert "c was not examined: no data set." in page


def test_what_strangers_write_is_text(tmp_path):
    name = "<script>alert(1)</script>$x_1$ 日本"
    run = write_run(tmp_path / "r" / name.replace("/", "|"))
    line = read_metrics(run, LAYERS)[0]
    evil = "<img src=x onerror=alert(1)>\ud800\x00"
    line["layers"] = {evil: line["layers"]["bn_0"], "bn_1": {}}
    line["inputs"] = {evil: {"all": [math.nan, 1.0, math.inf]}}
    (run / LAYERS).write_text(json.dumps(line) + "\n")
    (run / METRICS).write_text(
        '{"step": 5, "split": "test", "loss": NaN, "accuracy": "a"}\n'
        '{"step": 6, "split": "train"}\n'
    )
    page = report_of(run, findings=f"why: {evil}")
    assert "<script" not in page
    assert page.count("<img src=") == page.count('<img src="data:image/svg+xml;base64,')
    assert "onerror=alert(1)&gt;" in page
    page.encode()


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"split": "test"}', '{"step": "1"}', "[" * 100_000]
)
def test_damaged_records(tmp_path, line):
    run = write_run(tmp_path / "run")
    (run / METRICS).write_text(f"{line}\n")
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged: .* Restore the"):
        report_of(run)


@pytest.mark.parametrize("layers", [3, {"bn": 3}, {"bn": {"mean": "abc"}}])
def test_damaged_layers(tmp_path, layers):
    run = write_run(tmp_path / "run")
    line = {"step": 1, "layers": layers, "inputs": {}}
    (run / LAYERS).write_text(json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"layers.jsonl is damaged: .* Restore the"):
        report_of(run)


def test_a_file_too_large_to_be_a_record(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / METRICS).open("ab") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(RunError, match=r"268,435,457 bytes; a report reads at most"):
        report_of(run)


@functools.cache
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    return found


MEASURE = """<!doctype html><iframe id=f width={width} height=900 src=report.html>
</iframe><pre id=found></pre><script>
document.getElementById("f").addEventListener("load", event => {{
  const page = event.target.contentDocument;
  const images = [...page.images];
  for (const image of images) image.loading = "eager";
  Promise.all(images.map(image => image.decode())).then(() => {{
    for (const details of page.querySelectorAll("details")) details.open = true;
    document.getElementById("found").textContent = JSON.stringify({{
      wide: page.documentElement.scrollWidth,
      images: images.map(image => [image.naturalWidth, image.width, !!image.alt]),
      headings: page.querySelectorAll("h1, h2, h3").length,
    }});
  }});
}});
</script>"""


@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(tmp_path, width):
    program = browser()
    finding = Finding("rule", "error", "bn_0", {"ratio": 0.25}, "It is. " * 20, "Do.")
    runs = [
        write_run(tmp_path / f"a run with a long name {n}", changed(seed=n % 4))
        for n in range(8)
    ]
    site = tmp_path / "site"
    site.mkdir()
    (site / "report.html").write_text(report_of(*runs, findings=(finding,)))
    (site / "measure.html").write_text(MEASURE.format(width=width))
    with Served(site) as address:
        done = subprocess.run(
            [
                *(program, "--headless", "--no-sandbox", "--disable-gpu"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--no-first-run", "--enable-logging=stderr", "--dump-dom"),
                *(
                    "--virtual-time-budget=20000",
                    f"--user-data-dir={tmp_path / 'user'}",
                ),
                f"{address}/measure.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(re.search(r'<pre id="found">(.+?)</pre>', done.stdout)[1])
    # Nothing but tables scrolls sideways, and each chart is there.
    assert found["wide"] <= width
    assert len(found["images"]) == 8
    for natural, shown, described in found["images"]:
        assert natural > 300
        assert shown >= 0.65 * natural
        assert described
    assert found["headings"] == 8


class Served:
    """A folder over HTTP, on this machine alone."""

    def __init__(self, folder: Path):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Quiet, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
