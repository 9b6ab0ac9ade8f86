"""Pairs of a linear layer and a batch normalization, in many settings."""

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.folding.networks import DENSE, Case, Pair, difference, fold, random_input

TRANSPOSED = ("ConvTranspose", "ConvTranspose of transposed kernel")
# Convolutions have the most settings.
LAYERS = (*DENSE, "ConvLocal", *TRANSPOSED, *TRANSPOSED, *(["Conv"] * 6))


@st.composite
def cases(draw):
    layer = draw(st.sampled_from(LAYERS))
    conv = layer not in DENSE
    dilation = draw(st.sampled_from([1, 2])) if layer == "Conv" else 1
    return Case(
        layer,
        order=draw(st.sampled_from(["after", "after", "before"])),
        kind=draw(st.sampled_from(["bnjax", "flax"])),
        rank=draw(st.sampled_from([1, 2, 3])) if conv else 2,
        kernel=draw(st.sampled_from([1, 3])) if dilation == 1 else 2,
        groups=draw(st.sampled_from([1, 2, 4])) if layer == "Conv" else 1,
        stride=draw(st.sampled_from([1, 2])) if dilation == 1 else 1,
        dilation=dilation,
        padding=draw(st.sampled_from(["SAME", "VALID"])) if conv else "SAME",
        layer_bias=draw(st.booleans()),
        scale=draw(st.sampled_from(["none", "mixed", "zeros"])),
        shift=draw(st.sampled_from(["random", "zero"])),
        activation=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


def check(case):
    folded, found, expected = fold(Pair(case), random_input(case.shape), case)
    (row,) = folded.report
    assert (row.path, row.folded) == ("bn", case.folds), row
    assert bool(row.reason) != row.folded
    if row.folded:
        assert row.into == "layer/kernel"
        assert "bn" not in folded.params
        assert sorted(folded.params["layer"]) == ["bias", "kernel"]
    assert "batch_stats" not in folded.variables
    assert difference(found, expected) < 1e-5


@pytest.mark.slow
@hypothesis.settings(max_examples=30)
@hypothesis.given(cases())
def test_pairs(case):
    check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=150)
@hypothesis.given(cases())
def test_more_pairs(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("Conv", "before", groups=2, padding="VALID", stride=2),
        Case("Conv", "before", groups=4, padding="CIRCULAR"),
        Case("Conv", "before", groups=4, rank=3, kernel=2, padding="VALID"),
        Case("Conv", "before", rank=1, kernel=1, stride=2),
        Case("Conv", "before", scale="zeros", shift="zero"),
        Case("Conv", groups=4, rank=1, layer_bias=False, kind="flax"),
        Case("Conv", groups=2, rank=3, dilation=2, kernel=2),
        Case("ConvTranspose of transposed kernel", rank=1, stride=2),
        Case("ConvTranspose", "before", kernel=1, stride=1),
        Case("DenseGeneral", "before", kind="flax"),
        Case("Einsum", "before"),
        Case("ConvLocal", rank=1, padding="VALID"),
    ],
    ids=str,
)
def test_chosen_pairs(case):
    if case.padding == "CIRCULAR":
        # Padded by the map itself, before the convolution: BN stays before that.
        folded, found, expected = fold(Pair(case), random_input(case.shape), case)
        assert not folded.report[0].folded
        assert difference(found, expected) < 1e-5
    else:
        check(case)
