import contextlib
import errno
import json
import os
import re
from pathlib import Path

import pytest

from bnjax.training import workdir
from bnjax.training.config import RunError
from bnjax.training.metrics import EvalRecord as Scored
from bnjax.training.metrics import MetricsWriter, read_metrics
from bnjax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    LOCK,
    METRICS,
    SUMMARY,
    claim,
    default_workdir,
    read_json,
    write_json,
)


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


def test_claim_makes_the_folder_and_frees_it(tmp_path):
    workdir = tmp_path / "a" / "b"
    for _ in range(2):
        with claim(workdir) as resuming:
            assert not resuming
            assert [path.name for path in workdir.iterdir()] == [LOCK]


def test_claim_takes_a_folder_that_holds_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with claim(tmp_path):
        assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_one_process_at_a_time_writes_a_run(tmp_path, resume):
    with (
        claim(tmp_path),
        pytest.raises(RunError, match=rf"written by process {os.getpid()} on .*wait"),
        claim(tmp_path, resume=resume),
    ):
        pass


@pytest.mark.parametrize("fcntl", [None, "no locks"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, fcntl):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if fcntl is None:
        monkeypatch.setattr(workdir, "fcntl", None)
    else:
        monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    with claim(tmp_path):
        assert f"note: {tmp_path} cannot be locked (" in capsys.readouterr().err


@pytest.mark.parametrize("name", [CONFIG, METRICS, SUMMARY, EVALUATION, CHECKPOINTS])
def test_claim_refuses_a_run(tmp_path, name):
    (tmp_path / name).write_text("a run's")
    with (
        pytest.raises(RunError, match=f"holds a run already.*{re.escape(name)}"),
        claim(tmp_path),
    ):
        pass
    assert (tmp_path / name).read_text() == "a run's"
    if name == CONFIG:
        with claim(tmp_path, resume=True) as resuming:
            assert resuming


def test_claim_refuses_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(RunError, match=r"could not be written.*--workdir"),
            claim(path),
        ):
            pass


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write anywhere: run the tests as another user",
)
def test_claim_refuses_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"), claim(tmp_path / "run"):
        pass
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("data_name", "stem"),
    [
        ("digits", "mnist-20150211-120000"),
        ("../my photos/cats & dogs/", "mnist-cats_dogs-20150211-120000"),
    ],
)
def test_default_workdirs(tmp_path, monkeypatch, data_name, stem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20150211-120000")
    found = []
    for _ in range(3):
        found.append(default_workdir("mnist", data_name))
        found[-1].mkdir(parents=True)
    assert found == [Path("runs", stem + end) for end in ("", "-2", "-3")]


def test_json_comes_back(tmp_path):
    value = {"accuracy": 0.9830985915492958, "name": "a", "list": [1, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, full_disk):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"No space left on device.*--workdir"):
        write_json(tmp_path / "a.json", [2])
    assert read_json(tmp_path / "a.json") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run: it has no a.json"):
        read_json(tmp_path / "a.json")
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.json is damaged"):
            read_json(tmp_path / "a.json")


def test_metrics_are_there_as_soon_as_they_are_written(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path)) as metrics:
        for step in (1, 2):
            metrics.write(Scored(step, 0.5, 0.75))
            assert len(read_metrics(tmp_path)) == step
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(lines[0]) == {
        "step": 1,
        "split": "test",
        "loss": 0.5,
        "accuracy": 0.75,
    }
