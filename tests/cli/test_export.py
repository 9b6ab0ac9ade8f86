"""Runs exported: the file gives what the network gives."""

import jax
import numpy as np
import pytest

from bnjax.interop.export import load
from bnjax.training.evaluation import load_run


@pytest.fixture(scope="module")
def expected(trained):
    """Return pixels of test images and the logits of the run."""
    opened = load_run(trained("digits"))
    program, state = opened.restore()
    pixels = opened.source.load("test", lambda done, total: None).images[:7]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    x = np.float32(pixels) / 16
    logits = jax.jit(lambda v, x: program.model.apply(v, x, train=False))(variables, x)
    return pixels, np.asarray(logits)


@pytest.mark.parametrize("fold", ["--fold", "--no-fold"])
def test_logits_of_pixels(trained, run, expected, tmp_path, fold):
    out = tmp_path / "digits.stablehlo"
    printed = run("export", trained("digits"), out, fold).splitlines()
    assert printed == [
        f"{out}: {out.stat().st_size:,} bytes, step 60 of {trained('digits')}",
        "takes uint8 of shape (b, 8, 8), pixels from 0 to 16",
        "gives float32 of shape (b, 10), logits",
        "on cpu, cuda, tpu",
    ]
    loaded = load(out)
    pixels, logits = expected
    np.testing.assert_allclose(loaded(pixels), logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loaded(pixels[:1]), logits[:1], rtol=0, atol=1e-5)


def test_folding_takes_normalization_out(trained, run, tmp_path):
    programs = {}
    for flag in ("--fold", "--no-fold"):
        out = tmp_path / f"{flag}.stablehlo"
        run("export", trained("digits"), out, flag)
        programs[flag] = load(out).exported.mlir_module()
    assert "rsqrt" in programs["--no-fold"]
    assert "rsqrt" not in programs["--fold"]


def test_options(trained, run, expected, tmp_path):
    out = tmp_path / "digits.stablehlo"
    flags = ["--no-fold", "--inputs", "floats", "--softmax", "--batch-size", 7]
    out.write_text("old")
    printed = run(
        "export", trained("digits"), out, *flags, "--platforms", "cpu", "--force"
    )
    assert printed.splitlines()[1:] == [
        "takes float32 of shape (7, 8, 8)",
        "gives float32 of shape (7, 10), probabilities",
        "on cpu",
    ]
    pixels, logits = expected
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = load(out)(np.float32(pixels) / 16)
    np.testing.assert_allclose(found, probabilities, rtol=0, atol=1e-5)


def test_faults(trained, fails, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no layer.")

    taken = tmp_path / "taken"
    taken.write_text("old")
    assert "exists already" in fails("export", trained("digits"), taken, status=2)
    assert "is a folder" in fails("export", trained("digits"), tmp_path, status=2)
    missing = tmp_path / "no" / "file"
    assert "does not exist" in fails("export", trained("digits"), missing, status=2)
    onnx = fails("export", trained("digits"), tmp_path / "new.onnx", status=2)
    assert "bnjax.interop.onnx" in onnx
    assert "is not a run" in fails("export", tmp_path, tmp_path / "new.stablehlo")
    with monkeypatch.context() as patched:
        patched.setattr("bnjax.training.runs.fold_batch_norm", refuse)
        message = fails("export", trained("digits"), tmp_path / "new.stablehlo")
    assert "the network cannot be folded: no layer. Or export" in message
    flags = ["--no-fold", "--batch-size", 0]
    message = fails(
        "export", trained("digits"), tmp_path / "new.stablehlo", *flags, status=2
    )
    assert "expected 1 or more" in message
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert taken.read_text() == "old"
