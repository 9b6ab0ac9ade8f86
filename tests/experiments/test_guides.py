"""What the guides say of results is what the result files hold."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.figures import WITH, WITHOUT
from benchmarks.report import RESULTS as BENCHMARKS
from benchmarks.report import ROOT, percent
from benchmarks.timing import ratio
from experiments import adabn, batch_size, cancellation, population, renorm
from experiments import domains as kinds
from tests.experiments.test_results import BOTH, middle, page, result

GUIDE = "docs/library/which-normalization.md"
NETWORKS = ("layer", "chain", "block", "resnet50", "inception")


def row(*cells):
    return f"| {' | '.join(cells)} |"


def shown(share):
    return f"{percent(share)} %"


def programs(target, dtype="bfloat16"):
    """Return the programs on one chip, by network and kind."""
    return {
        (program["network"], program["kind"]): program
        for program in result(f"compiled-{target}", BENCHMARKS)["rows"]
        if (program["chips"], program["dtype"]) == (1, dtype)
        and "failed" not in program
    }


def over(found, network, kind, figure, other="flax"):
    return found[network, kind][figure] / found[network, other][figure]


def small_batches() -> Iterator[str]:
    found = result("batch_size")
    yield f"after {found['examples_seen']:,} examples"
    accuracy = {
        size: [middle(found[name][size], batch_size.INFERENCE) for name in BOTH]
        for size in found[WITH]
    }
    for size, both in accuracy.items():
        yield row(size, *map(shown, both))
    ahead = {size for size, (with_, without) in accuracy.items() if with_ > without}
    assert ahead == {"16", "32", "64", "128", "256"}
    assert "With 16 examples or more" in page(GUIDE)
    found = result("renorm")
    yield f"{found['examples_seen']:,} examples"
    for size, runs in found["runs"].items():
        names = (WITH, renorm.RENORM, WITHOUT)
        with_, renormalized, _ = ends = [
            middle(runs[name], "test_accuracy") for name in names
        ]
        assert renormalized > with_
        yield row(size, *map(shown, ends))


def domains() -> Iterator[str]:
    table = result("domains")["table"]
    inverted, noisy = table["populations"].values()
    for word, accuracy in (("inverted", inverted), ("with noise", noisy)):
        cells = (
            "{}, {} %".format(*map(percent, accuracy[name]))
            for name in (kinds.TOGETHER, kinds.SHARED, kinds.OWN)
        )
        yield row(word, *cells)
    yield "that gives {} and {} %".format(*map(percent, inverted[kinds.APART]))


def adaptation() -> Iterator[str]:
    words = ("as trained", "faint", "noisy", "blurred", "inverted")
    for word, accuracy in zip(words, result("adabn")["median"].values(), strict=True):
        yield row(word, shown(accuracy[adabn.TRAINING]), shown(accuracy[adabn.ALL]))
    found = result("domains")
    random, by_class = found["table"]["adaptation"].values()
    at = [found["weights"].index(weight) for weight in ("0", "64", "inf")]
    yield "N = 64"
    for size in ("500", "20", "4"):
        yield row(f"{size} at random", *(shown(random[size][i]) for i in at))
    yield row("500 of one class", *(shown(by_class["500"][i]) for i in at))


def early() -> Iterator[str]:
    found = result("population")
    names = (population.MOVING, population.PAPER)
    first, last = (
        [
            middle(found["after_steps"], name, found["steps"].index(step))
            for name in names
        ]
        for step in (100, 500)
    )
    yield f"evaluation after 100 steps gives {percent(first[0])} %"
    yield f"by [`recompute_batch_stats`](population.md), {percent(first[1])} %"
    yield "After 500 steps the two give {} and {} %".format(*map(percent, last))
    at, runs = found["averaged_steps"].index(100), found["averaged_parameters"]
    stale, own = (middle(runs, n, at) for n in (population.STALE, population.OWN))
    yield f"after 100 steps give {percent(stale)} % with the moving averages"
    yield f"and {percent(own)} % with pooled statistics of their own"


def recurrence() -> Iterator[str]:
    for name, runs in result("recurrent").items():
        times = ([run["seconds_per_step"] for run in runs[n]] for n in BOTH)
        slower = f"{ratio(*times):.1f} times"
        (length,) = re.findall(r"\((\d+) of", name)
        sequence = f"{length} {name.split()[0]}"
        for at, time in ((0, slower), (-1, "")):
            both = [middle(runs[n], "test_accuracy", at) for n in BOTH]
            after = f"{runs[WITH][0]['steps'][at]} steps"
            line = row(sequence, after, *map(shown, both), time)
            yield line.replace("  ", " ")


def whitening() -> Iterator[str]:
    found = result("whitening")
    first, last = found["steps"][0], found["steps"][-1]
    yield f"after {first} steps | after {last:,} steps"
    for name, accuracy in found["median"].items():
        ends = (accuracy["running statistics"][at] for at in (0, -1))
        yield row(name, *map(shown, ends))


def without() -> Iterator[str]:
    found = result("depth")
    yield f"after {found['steps']} steps on CIFAR-10"
    table = found["table"]
    loss = {name: run["train_loss_of_last_tenth"] for name, run in table.items()}
    yield f"a training loss of {loss[f'ResNet-20 {WITH}, 0.1']:.2f} with"
    yield f"a loss of {loss[f'ResNet-110 {WITH}, 0.1']:.2f} with"
    of_20 = [loss[name] for name in loss if name.startswith("ResNet-20 without")]
    yield "at rates of 0.1, 0.01 and 0.001"
    yield f"a loss of {min(of_20):.2f} to {max(of_20):.2f}, which is chance"
    lost = [run["diverged"] for name, run in table.items() if "110 without" in name]
    assert len(lost) == 3
    assert all("not finite" in why for why in lost)
    runs = result("mnist")["runs"]
    at = runs[WITH][0]["steps"].index(10_000)
    reached = (percent(middle(runs[name], "test_accuracy", at)) for name in BOTH)
    yield f"reaches {next(reached)} % after 10,000 steps"
    yield f"without reaches {next(reached)} %"


def costs() -> Iterator[str]:
    cells = {}
    for target, figure in (("v5e", "cycles"), ("h200", "traffic_bytes")):
        for kind in ("renorm", "ghost"):
            shares = [
                over(found, network, kind, figure, "bnjax")
                for dtype in ("bfloat16", "float32")
                for found in [programs(target, dtype)]
                for network in ("layer", "chain")
            ]
            ends = dict.fromkeys(f"{f(shares):.2f}" for f in (min, max))
            cells[kind, target] = " to ".join(ends)
    for kind, name in (
        ("renorm", "`BatchRenorm`"),
        ("ghost", "`GhostBatchNorm`, four groups"),
    ):
        line = row(name, cells[kind, "v5e"], cells[kind, "h200"], "")
        yield line.replace("  ", " ")
    whitened = [
        share
        for each in result("whitening-cpu", BENCHMARKS)["rows"]
        for name, share in each["ratios"].items()
        if name != "batch norm"
    ]
    span = f"{min(whitened):.1f} to {max(whitened):.1f}"
    yield f"| `WhiteningBatchNorm`, groups of 16 to 64 | | | {span} |"
    on_tpu, on_gpu = (
        over(programs(target), "resnet50", "bnjax_inside", figure, "none")
        for target, figure in (("v5e", "cycles"), ("h200", "traffic_bytes"))
    )
    yield f"take {on_tpu:.2f} times the cycles of the network without"
    yield f"{on_gpu:.2f} times the traffic on an H200"


CLAIMS = (small_batches, domains, adaptation, early, recurrence, whitening, without)
CLAIMS += (costs,)


def test_every_number_of_which_normalization_is_derived_from_a_file():
    text = left = page(GUIDE)
    for claims in CLAIMS:
        for phrase in claims():
            assert phrase in text
            left = left.replace(phrase, "")
    # What is no result: names, and what is said of a method or of a setting.
    _, _, left = left.partition("## Small batches")
    names = r"\(\S*?\)|CIFAR-10|ResNet-\d+|ResNet-50|v5e|H200|bfloat16|float32|MNIST"
    left = re.sub(names, "", left)
    left = re.sub(r"With 16 examples|mean 0 and variance 1|momentum of 0\.99", "", left)
    near = re.findall(r".{0,20}\d.{0,20}", left)
    assert not near


def test_the_summary_of_compiled_programs():
    text = page("docs/library/compiled.md").partition("## What can be read off")[0]
    lines = re.findall(
        r"\| ((?:v5e|v5p|v6e|h200) \|.*?)(?= \| (?:v5|v6|h2)| \| - )", text
    )
    assert len(lines) == 11
    for line in lines:
        target, network, cycles, *others = (
            cell.strip() for cell in line.strip("| ").split("|")
        )
        found = programs(target)
        figures = ["traffic_bytes", "temporary_bytes"]
        if target != "h200":
            figures, others = ["cycles", *figures], [cycles, *others]
        for figure, cell in zip(figures, others, strict=True):
            assert cell == f"{over(found, network, 'bnjax_inside', figure):.2f}"
    v5e, h200 = programs("v5e"), programs("h200")
    more = over(v5e, "inception", "bnjax_inside", "cycles") - 1
    assert f"takes {100 * more:.1f} % more cycles" in text
    for target in ("v5e", "v5p", "v6e"):
        found = programs(target)
        for network in NETWORKS:
            for kind in ("bnjax", "bnjax_inside"):
                if (network, "flax") in found:
                    share = over(found, network, kind, "cycles")
                    assert share == pytest.approx(1, abs=0.015)
    for target in ("v5e", "h200"):
        saved = over(programs(target), "resnet50", "bnjax_policy", "temporary_bytes")
        assert f"{saved:.2f} times" in text
    paid = over(v5e, "resnet50", "bnjax_policy", "cycles")
    assert f"on a v5e, for {paid:.2f} times the cycles" in text
    paid = over(h200, "resnet50", "bnjax_policy", "traffic_bytes")
    assert f"on an H200, for {paid:.2f} times the traffic" in text


def test_what_the_layer_adds_on_a_gpu():
    text, found = page("docs/library/compiled.md"), programs("h200")
    added = {
        (network, kind): found[network, kind]["traffic_bytes"]
        - found[network, "none"]["traffic_bytes"]
        for network in NETWORKS
        for kind in ("flax", "bnjax", "bnjax_inside")
    }
    inside, outside = (
        {n: added[n, kind] / added[n, "flax"] for n in NETWORKS}
        for kind in ("bnjax_inside", "bnjax")
    )
    ends = f"{min(inside.values()):.2f} to {max(inside.values()):.2f} times the traffic"
    assert f"adds {ends} that Flax's layer adds" in text
    assert f"Inception: {outside.pop('inception'):.2f} times" in text
    np.testing.assert_allclose(list(outside.values()), 1, atol=0.015)
    small = max(
        over(found, "mlp", k, "traffic_bytes") for k in ("bnjax", "bnjax_inside")
    )
    size = found["mlp", "flax"]["traffic_bytes"] / 1e6
    assert f"{small:.2f} times the traffic of Flax's, which is about {size:.0f}" in text


def test_the_collectives_of_one_layer():
    chips = {}
    for target in ("v5e", "h200"):
        for program in result(f"compiled-{target}", BENCHMARKS)["rows"]:
            if program["sharing"] and program["network"] == "layer":
                count = program["collectives"]["count"]
                assert count == 1 + program["backward"]
                chips.setdefault(target, set()).add(program["chips"])
    assert chips == {"v5e": {4, 16, 256}, "h200": {8}}
    words = "on 4, 16 and 256 chips of a v5e and on 8 of an H200"
    assert words in page("docs/library/compiled.md")


def test_the_programs_of_how_it_works():
    text = page("docs/how-it-works.md")
    v5e, h200 = programs("v5e"), programs("h200")
    inside, outside = (
        h200["layer", kind]["traffic_bytes"] / h200["layer", kind]["array_bytes"]
        for kind in ("bnjax_inside", "bnjax")
    )
    assert f"moves {inside:.2f} arrays of the size of its input with" in text
    assert f"and {outside:.2f} with the ReLU outside" in text
    chain = v5e["chain", "bnjax_inside"]
    assert f"{chain['fused_sums']} fusions hold a convolution and the sums" in text
    added = over(v5e, "chain", "bnjax_inside", "cycles", "none") - 1
    assert f"adds {100 * added:.0f} % to the cycles" in text


def test_the_error_of_a_variance_by_origin():
    text, found = page("docs/how-it-works.md"), result("cancellation")
    means, error = np.asarray(found["means"]), found["error"]
    # Where an error passes 1 the variance has no digit, and the bound no meaning.
    assert "at most about $4 \\cdot 10^{-7} (1 + d^2 / \\sigma^2)$" in text
    bound = cancellation.BOUND * (1 + means**2)
    assert np.all(np.asarray(error[cancellation.ZERO]) <= bound)
    for name, distance in cancellation.ORIGINS.items():
        assert max(error[name]) <= cancellation.BOUND * (1 + distance**2)
    assert max(error[cancellation.MOMENTS]) < 2e-7
    assert error[cancellation.TWO_PASSES][-1] > 1e-3
    fresh = cancellation.errors(1e4, 0)
    assert fresh[cancellation.MOMENTS] < 1e-6 < 1 < fresh[cancellation.ZERO]


def test_the_summary_of_performance():
    text = page("docs/library/performance.md")
    groups = result("layer-cpu", BENCHMARKS)["summary"]
    means = {}
    for group in groups:
        if "plain" in group.values():
            mean = group["ratios"]["flax.linen"]["mean"]
            means.setdefault((group["pass"], group["dtype"]), []).append(mean)
    single, half = (sorted(means["train", dtype]) for dtype in ("float32", "bfloat16"))
    assert "takes {:.2f} to {:.2f} times as long as bnjax in".format(*single) in text
    assert "and {:.2f} to {:.2f} times as long in bfloat16".format(*half) in text
    inference = sorted(means["inference", "float32"])
    assert "the ratio is {:.2f} to {:.2f}".format(*inference) in text
    steps = result("step-cpu", BENCHMARKS)["rows"]
    added, whole = (
        (min(shares), max(shares))
        for shares in zip(
            *((r["added_over_flax"], r["step_over_flax"]) for r in steps), strict=True
        )
    )
    assert "is {:.2f} to {:.2f} times what Flax's BN adds".format(*added) in text
    assert "whole step takes {:.2f} to {:.2f} times as long".format(*whole) in text
    compiled = [
        each["over_flax"]["total"]
        for each in result("compile_time-cpu", BENCHMARKS)["rows"]
    ]
    span = f"{min(compiled):.2f} to {max(compiled):.2f}"
    assert f"takes {span} times as long as with Flax's" in text


def test_the_speed_of_a_folded_network():
    (row,) = result("folding", BENCHMARKS)["rows"]
    ours, flax = (row["ratios"][f"{name} / folded"] for name in ("unfolded", "flax"))
    text = page("docs/library/folding.md")
    assert f"takes {ours['median_of_rounds']:.2f} times as long as the folded" in text
    assert f"with Flax's {flax['median_of_rounds']:.2f} times" in text
    lowest = min(ours["lowest"], flax["lowest"])
    highest = max(ours["highest"], flax["highest"])
    assert f"range from {lowest:.2f} to {highest:.2f}" in text
    folded, unfolded = (row[name]["flops"] / 1e9 for name in ("folded", "unfolded"))
    assert f"needs {folded:.2f} GFLOP, the unfolded network {unfolded:.2f}" in text
    folded, unfolded = (row[name]["bytes_accessed"] for name in ("folded", "unfolded"))
    assert folded == pytest.approx(unfolded, rel=1e-3)


def test_the_rate_of_streaming():
    found = result("streaming_rate", BENCHMARKS)
    text = page("docs/programs/data.md")
    assert f"reads {found['images_per_second_and_core']:,.0f} images/s" in text
    small, large = (
        round(100 * row["share_waiting"])
        for row in found["rows"]
        if row["workers"] == 2 and row["batch_size"] in (16, 32)
    )
    needs = f"needs {found['model_step_ms']:.0f} ms a step waits {small} % of the time"
    assert f"{needs} with batches of 16, and {large} % with batches of 32" in text


# Numbers of the README that are no measurements: versions, sections, defaults, names.
NOT_MEASURED = [
    "3.11",
    "4.1",
    "1,797",
    "0.9",
    "0.1",
    "1e-5",
    "1",
    "10,000",
    "50,000",
    "5",
    "3",
    "2.0",
    "2015",
    "1502.03167",
    "13",
]


def test_every_number_of_the_readme():
    """A number of the README is in a tested phrase, or said to be no measurement."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"(?s)<!-- tables.*?<!-- end -->|```.*?```|`[^`]*`", "", text)
    text = re.sub(r"\]\([^)]*\)|[\w-]+\.json|ResNet-\d+|CIFAR-10|bfloat16", "", text)
    runs, best = result("mnist")["runs"], result("cifar10")["table"]
    at = [runs[WITH][0]["steps"].index(step) for step in (10_000, 50_000)]
    derived = [
        percent(middle(runs[name], "test_accuracy", i)) for name in BOTH for i in at
    ]
    derived += [percent(best[name]["best_accuracy"]) for name in ("BN-x5", "Inception")]
    layer, loop = (
        result(name, BENCHMARKS) for name in ("mnist_steps_per_second", "training_rate")
    )
    rates, medians = layer["steps_per_second"], layer["steps_per_second_median"]
    derived.append(f"{ratio(rates['bnjax'], rates['flax']):.2f}")
    derived.append(f"{medians['none'] / medians['bnjax']:.2f}")
    loops = loop["steps_per_second"]
    derived.append(f"{ratio(loops['train.py'], loops['flax loop']):.2f}")
    found = re.findall(r"\d[\d,.e-]*\d|\d", text)
    assert set(derived) <= set(found)
    assert set(found) == {*derived, *NOT_MEASURED}
