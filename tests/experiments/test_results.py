"""What the pages say of results is what the result files hold."""

import importlib
import re
import statistics

import numpy as np
import pytest

from benchmarks.figures import WITH, WITHOUT
from benchmarks.report import RESULTS as BENCHMARKS
from benchmarks.report import ROOT, percent, read_result
from benchmarks.timing import ratio
from experiments import adabn, batch_size, cifar10, population, renorm, smoothness
from experiments import domains as kinds
from experiments.figures import RESULTS as DRAWN
from experiments.runs import RESULTS

BOTH = (WITH, WITHOUT)


def page(name):
    """Return a page with every run of white space as one space."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text("utf-8"))


def result(name, folder=RESULTS):
    return read_result(folder / f"{name}.json")["result"]


def middle(runs, name, at=None):
    """Return the median of some runs, at an index of their curves."""
    return statistics.median(r[name] if at is None else r[name][at] for r in runs)


def joined(words):
    *first, last = words
    return f"{', '.join(first)} and {last}"


def shares(values):
    """Return shares as 1.0, 2.0 and 3.0."""
    return joined(map(percent, values))


def span(values):
    """Return the lowest and the highest of shares as 1.0 to 3.0."""
    return f"{percent(min(values))} to {percent(max(values))}"


def mnist(r):
    runs, compared = r["runs"], r["comparison"]
    steps = runs[WITH][0]["steps"]
    early, late = (
        [percent(middle(runs[n], "test_accuracy", steps.index(step))) for n in BOTH]
        for step in (10_000, 50_000)
    )
    yield "after 10,000 steps {} % with, {} % without".format(*early)
    yield "after 50,000 {} % and {} %".format(*late)
    assert compared["steps_where_median_with_is_not_above"] == []
    below = compared["steps_where_with_is_not_above_by_seed"]
    ((seed, (step,)),) = ((seed, at) for seed, at in below.items() if at)
    every = len(steps) * len(below)
    yield f"all {len(steps)} evaluations in the medians, at {every - 1} of {every} seed"
    yield f"not seed {seed} at step {step:,}"
    yield f"after {compared['steps_with_to_reach_final_without']:,} steps"
    inputs = [r["inputs_of_the_last_hidden_layer"][name] for name in BOTH]
    spans = (each["all_units_median_span"]["50"] for each in inputs)
    share = (f"{each['all_units_span_over_mean_width']['50']:.2f}" for each in inputs)
    yield f"over {steps[-1]:,} steps, from its lowest to its highest"
    yield "{:.2f} with, {:.2f} without".format(*spans)
    yield f"{joined(share)} of the distance between the 15th and 85th percentile"


def inception(r):
    last = r["runs"]["Inception"][0]["steps"][-1]
    yield f"{last:,} steps of {r['examples_in_a_step']}"


def scale_invariance(r):
    exact, usual = r["epsilon 1e-20"].values(), r["epsilon 1e-5"].values()
    large = max(e for of in usual for e, a in zip(of, r["a"], strict=True) if a >= 1)
    assert (r["a"][0], r["a"][-1], f"{large:.0e}") == (1e-3, 1e3, "1e-05")
    yield "for a from 1e-3 to 1e3 in float32"
    yield f"to {1e7 * max(map(max, exact)):.1f}e-7, with an epsilon of 1e-20"
    yield "With 1e-5 only for a of 1 and above (1e-5)"
    yield f"at 1e-3 the weights' scale is lost to epsilon ({next(iter(usual))[0]:.2f})"


def jacobian(r):
    small, large = (
        [each[n]["hidden layer 2 to 3"]["percentiles"]["50"] for n in BOTH]
        for each in (r["weight_std 0.01"], r["weight_std 0.1"])
    )
    (start,) = {f"{values[0]:.1f}" for values in small + large}
    with_, without = small[0][-1], small[1][-1]
    yield f"at the start their median is {start} with and without"
    yield f"After {r['steps'][-1]:,} steps {with_:.2f} with and {without:.3f} without"
    end = joined(f"{values[-1]:.2f}" for values in large)
    yield f"{end} where the weights start at 0.1: closer to 1 with, close to 1 only"


def bias_drift(r):
    found, steps = r["mean outside the gradient"], r["steps"][-1]
    assert found["range_of_loss_in_second_half"] < 1.5e-4
    inside = r["mean inside the gradient"], r["batch normalization (both inside)"]
    assert max(abs(b) for each in inside for b in each["bias"]) < 1e-4
    each, final = found["bias_per_step_in_second_half"], found["final_bias"]
    yield f"by {each:.4f} in each of {steps:,} steps, to {final:.0f}, while"
    yield "the loss moves by 1e-4 in the second half"
    yield "inside the gradient the bias stays below 1e-4"


def small_batches(r):
    with_, without, tested = (
        [middle(runs, mode) for runs in r[name].values()]
        for name, mode in (
            (WITH, batch_size.INFERENCE),
            (WITHOUT, batch_size.INFERENCE),
            (WITH, batch_size.TRAINING),
        )
    )
    (low,) = {percent(accuracy) for accuracy in without[:3]}
    yield f"after {r['examples_seen']:,} examples"
    yield f"with batches of 16 and more {span(with_[3:])} % with"
    yield f"and {span(without[3:])} % without"
    of_2 = span([run[batch_size.INFERENCE] for run in r[WITH]["2"]])
    yield f"of 8, 4 and 2 {shares(with_[2::-1])} % with (of 2 from {of_2}), {low} %"
    yield f"{percent(tested[3])} % for 16, {percent(tested[0])} % for 2. A batch of 1"


def changes(r):
    points = {
        name: f"{abs(row['points_from_reference']):.1f}"
        for name, row in r["table"].items()
    }
    ours, crops = (r["table"][n]["accuracy"] for n in ("BN-x5", "BN-x5 on crops"))
    yield f"of BN-x5's {percent(ours)} %, dropout costs {points['dropout']} points"
    for name in ("batches that always meet", "local response normalization"):
        yield f"{name} {points[name]}"
    yield f"the slower decay {points['the slower decay']}"
    yield f"the lower rate {points['the lower learning rate']}"
    yield f"the larger L2 weight gains {points['the larger L2 weight']}"
    full = points["crops with the full distortion"]
    yield f"colours costs {full} of the {percent(crops)} % on crops"


def depth(r):
    def losses(number, name):
        return [
            f"{row['train_loss_of_last_tenth']:.2f}"
            for key, row in r["table"].items()
            if key.startswith(f"ResNet-{number} {name},")
        ]

    yield f"after {r['steps']} steps"
    for number in (110, 20):
        (loss,), row = losses(number, WITH), r["table"][f"ResNet-{number} {WITH}, 0.1"]
        yield f"{loss} for ResNet-{number}"
        yield f"({percent(row['test_accuracy'])} % of the test set)"
    yield "at rates of 0.1, 0.01 and 0.001"
    yield f"ResNet-20 is at {joined(losses(20, WITHOUT))} (chance is 2.303)"
    lost = [row["diverged"] for key, row in r["table"].items() if "110 without" in key]
    assert all("not finite" in why for why in lost)


def lenet(r):
    ours, flax, without = r["table"].values()
    assert ours["test_accuracy"] == flax["test_accuracy"]
    rates = [rate for row in r["table"].values() for rate in row["examples_per_second"]]
    yield f"{len(r['runs']['bnjax'][0]['steps'])} epochs"
    both = (percent(each["median_test_accuracy"]) for each in (ours, without))
    yield "{} % with, {} % without".format(*both)
    yield f"about {round(statistics.median(rates), -3):,.0f} examples/s"


def ensemble(r):
    for crops, words in {
        "1": "on one crop the six reach {} % and together {} %",
        "10": "on ten crops {} % and {} %",
        "144": "on GoogLeNet's 144, made for larger images, {} % and {} %",
    }.items():
        found = r["by_crops"][crops]
        members = [member["test_accuracy"] for member in found["members"]]
        yield words.format(span(members), percent(found["test_accuracy"]))
    yield "144 crops of a 32x32 image lose"


def algorithm_2(r):
    names = (population.MOVING, population.PAPER, population.POOLED)
    yield "by Algorithm 2 and by its pooled variant"
    for step, word in (
        (100, "100 steps"),
        (200, "200"),
        (500, "500"),
    ):
        at = r["steps"].index(step)
        yield f"after {word} {shares(middle(r['after_steps'], n, at) for n in names)} %"
    at, runs = r["averaged_steps"].index(100), r["averaged_parameters"]
    stale, own = (middle(runs, n, at) for n in (population.STALE, population.OWN))
    yield f"after 100 steps: {percent(stale)} % with the network's moving averages"
    yield f"{percent(own)} % with pooled statistics of their own"
    sizes = r["batch_sizes"].values()
    moving, paper, pooled = ([middle(runs, n) for runs in sizes] for n in names)
    yield f"After {r['examples_seen']:,} examples with batches of 4 to 256"
    gains = (
        span([new - old for new, old in zip(each, moving, strict=True)])
        for each in (paper, pooled)
    )
    yield "{} points by Algorithm 2 and {} pooled".format(*gains)


def domains(r):
    words = ("", "faint images", "noisy", "blurred", "inverted")
    for word, row in list(zip(words, r["median"].values(), strict=True))[1:]:
        yield f"{word} {shares([row[adabn.TRAINING], row[adabn.ALL]])} %"


def populations(r):
    inverted, noisy = r["table"]["populations"].values()
    yield f"inverted: {shares(inverted[kinds.TOGETHER])} % with one population"
    yield f"{shares(inverted[kinds.APART])} % where each kind is normalized apart"
    yield f"{shares(inverted[kinds.SHARED])} % with two and one scale and bias"
    yield f"{shares(inverted[kinds.OWN])} % with two of each"
    both = (noisy[name][1] for name in (kinds.TOGETHER, kinds.OWN))
    yield "With noise, one and two populations reach {} and {} %".format(
        *map(percent, both)
    )
    random, by_class = r["table"]["adaptation"].values()
    at = {weight: r["weights"].index(weight) for weight in ("0", "64", "inf")}
    yield f"noise: {percent(random['500'][at['inf']])} % by the statistics of training"
    yield f"{percent(r['table'][kinds.ADABN])} % by AdaBN"
    for size in ("500", "20", "4"):
        yield f"{percent(random[size][at['0']])} % by batches of {size}"
    blended = (random[size][at["64"]] for size in ("500", "20", "4"))
    yield f"blended at N = 64 {shares(blended)} %"
    yield f"{percent(by_class['500'][at['0']])} % by batches of one class"


def smooth(r):
    def three(data, name, write="{:.2f}".format):
        rows = r["table"][data]
        return joined([write(rows[n][name]["median"]) for n in smoothness.NETWORKS])

    for name, write, end in (
        ("range_of_loss", "{:.2f}".format, " on MNIST"),
        ("beta_geometric_mean", "{:.2f}".format, ""),
        ("shift_cosine", "{:.2f}".format, ""),
        ("test_accuracy", percent, " %"),
    ):
        yield three(smoothness.MNIST, name, write) + end
        yield three(smoothness.CIFAR, name, write)


def renormalized(r):
    yield f"after {r['examples_seen']:,} examples"
    for case, word in (
        ("2", "of 2"),
        ("4", "of 4"),
        ("32 of one class", "of 32 images of one class"),
    ):
        ends = [
            middle(r["runs"][case][name], "test_accuracy")
            for name in (WITH, renorm.RENORM, WITHOUT)
        ]
        yield f"{word} {shares(ends)} %"


def recurrence(r):
    for name, runs in r.items():
        steps = runs[WITH][0]["steps"]
        for at in (0, -1):
            both = [middle(runs[n], "test_accuracy", at) for n in BOTH]
            yield f"after {steps[at]} steps {shares(both)} %"
        times = ([run["seconds_per_step"] for run in runs[n]] for n in BOTH)
        yield f"{name.split()[0]} {ratio(*times):.1f} times"
        length = re.search(r"\d+", name)[0]
        yield f"{length} {name.split()[0]}"


def whitened(r):
    first, last = (
        [row["running statistics"][at] for row in r["median"].values()]
        for at in (0, -1)
    )
    yield f"after {r['steps'][0]} steps {shares(first)} %"
    yield f"after {r['steps'][-1]:,} {shares(last)} %"
    sizes = [re.search(r"groups of (\d+)", name) for name in r["median"]]
    small, large = dict.fromkeys(size[1] for size in sizes if size)
    yield f"in groups of {small} and then of {large} units"


CLAIMS = {
    "mnist": mnist,
    "cifar10": inception,
    "scale_invariance": scale_invariance,
    "jacobian": jacobian,
    "bias_drift": bias_drift,
    "batch_size": small_batches,
    "cifar10_changes": changes,
    "depth": depth,
    "lenet_mnist": lenet,
    "cifar10_ensemble": ensemble,
    "population": algorithm_2,
    "adabn": domains,
    "domains": populations,
    "smoothness": smooth,
    "renorm": renormalized,
    "recurrent": recurrence,
    "whitening": whitened,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_number_of_a_claim_is_derived_from_its_file(name):
    lines = (ROOT / "docs/programs/experiments.md").read_text("utf-8").splitlines()
    (at,) = (i for i, line in enumerate(lines) if f"/results/{name}.json)" in line)
    row, below = (line.split("|") for line in lines[at : at + 2])
    cell = row[3] + (below[3] if " the same " in below[2:3] else "")
    left = re.sub(r"\[.*?\]\(.*?\)|CIFAR-10", "", cell)
    for phrase in CLAIMS[name](result(name)):
        assert phrase in cell
        left = left.replace(phrase, "")
    assert not re.search(r"\d", re.sub(r"ResNet-\d+", "", left)), left


def test_what_the_variants_cost_on_a_tpu_and_a_gpu():
    over = {}
    for target, figure in (
        ("v5e", "cycles"),
        ("v5e", "traffic_bytes"),
        ("h200", "traffic_bytes"),
    ):
        rows = {
            (row["network"], row["dtype"], row["kind"]): row[figure]
            for row in result(f"compiled-{target}", BENCHMARKS)["rows"]
            if row["chips"] == 1 and "failed" not in row
        }
        for (network, dtype, kind), value in rows.items():
            if kind in ("renorm", "ghost") and network != "mlp":
                share = value / rows[network, dtype, "bnjax"]
                over.setdefault((kind, target, figure, network), []).append(share)
    for (kind, *_), shares in over.items():
        if kind == "renorm":
            np.testing.assert_allclose(shares, 1, atol=1e-3)
    cycles, traffic, on_gpu = (
        [
            share
            for (kind, *cell, _), shares in over.items()
            for share in shares
            if (kind, *cell) == ("ghost", target, figure)
        ]
        for target, figure in (
            ("v5e", "cycles"),
            ("v5e", "traffic_bytes"),
            ("h200", "traffic_bytes"),
        )
    )
    text = page("docs/library/compiled.md")
    assert f"take {min(cycles):.2f} to {max(cycles):.2f} times the cycles" in text
    most = (
        f"at most {max(traffic):.2f} times the traffic there and {max(on_gpu):.2f} on"
    )
    assert most in text


def test_what_whitening_costs():
    small, large = (
        [share for name, share in row["ratios"].items() if name != "batch norm"]
        for row in result("whitening-cpu", BENCHMARKS)["rows"]
    )
    text = page("docs/variants/whitening.md")
    assert f"{min(small):.1f} to {max(small):.1f} times as long with 64 chan" in text
    assert f"{min(large):.1f} to {max(large):.1f} times with 256" in text


def test_the_table_of_inception():
    text, r = page("docs/programs/experiments.md"), result("cifar10")
    for name, row in r["table"].items():
        steps, share = row["steps_to_best_of_inception"], row["over_steps_of_inception"]
        chance = " (chance)" * (row["best_accuracy"] == 0.1)
        cells = f"| {name} | {percent(row['best_accuracy'])} %{chance} | "
        cells += f"{steps:,} | {round(share, 2):g} |" if steps else "never | |"
        share, accuracy = cifar10.PAPER[name]
        if accuracy and accuracy > 1:
            cells += f" {round(share, 2):g}" if share else " never"
            cells += f", {accuracy} % |"
        assert cells in text
    fifth = r["in_a_fifth_of_the_steps"]
    ours, sigmoids = (fifth[name] for name in ("BN-x5", "BN-x5-Sigmoid"))
    assert f"({ours['steps']:,} steps, 0.96 every {ours['decay_steps']})" in text
    assert f"{shares(sigmoids['accuracy'])} % for three seeds" in text
    assert f"BN-x5 comes to {shares(ours['accuracy'])} % in them" in text


def test_the_table_of_other_settings():
    text, rows = page("docs/programs/experiments.md"), result("mnist")["settings"]
    for both in zip(rows[1::2], rows[::2], strict=True):
        cells = [f"| {both[0]['weight_std']:g} | {both[0]['learning_rate']:g} |"]
        for row, name in zip(both, (WITHOUT, WITH), strict=True):
            assert row["network"] == name
            cells += [f"{row['accuracy_at_10000']:.2f}, {row['accuracy_at_end']:.2f} |"]
            cells += [f"{row['known_at_10000']:.2f}, {row['known_at_50000']:.2f} |"]
        assert " ".join(cells) in text


def test_the_results_of_the_readme():
    text, runs = page("README.md"), result("mnist")["runs"]
    steps, table = runs[WITH][0]["steps"], result("cifar10")["table"]
    for step in (10_000, 50_000):
        at = steps.index(step)
        both = (percent(middle(runs[n], "test_accuracy", at)) for n in BOTH)
        row = "after {:,} steps[^|]*\\| {} % \\| {} % \\|".format(step, *both)
        assert re.search(row, text)
    best = (percent(table[n]["best_accuracy"]) for n in ("BN-x5", "Inception"))
    assert "(BN-x5, Inception) | {} % | {} % |".format(*best) in text


def test_the_two_rates_of_the_mnist_network():
    layer, loop = (
        result(name, BENCHMARKS) for name in ("mnist_steps_per_second", "training_rate")
    )
    rates, medians = layer["steps_per_second"], layer["steps_per_second_median"]
    over_flax = f"{ratio(rates['bnjax'], rates['flax']):.2f} times"
    loops = loop["steps_per_second"]
    over = {
        name: f"{ratio(loops['train.py'], each):.2f}" for name, each in loops.items()
    }
    pages = "docs/library/performance.md", "docs/programs/training.md"
    for name in ("README.md", *pages):
        text = page(name)
        assert over_flax in text
        assert f"{over['flax loop']} times" in text
        assert "mnist_steps_per_second.json" in text
        assert "training_rate.json" in text
    for median in loop["steps_per_second_median"].values():
        assert f"| {median:,.0f} |" in text
    assert f"{over['torch loop']} times PyTorch's, and {over['products']} of" in text
    assert f"{medians['none'] / medians['bnjax']:.2f} times" in page("README.md")


def test_the_text_beside_the_tables_of_performance():
    text = page("docs/library/performance.md")
    rows = result("kernels-cpu", BENCHMARKS)["rows"]
    (step,) = (r for r in rows if r["shape"][:4] == "step" and r["library"] == "bnjax")
    (calls, us), *_ = (
        (k["calls"], k["us"]) for k in step["kernels"] if k["name"] == "ffi_call"
    )
    assert f"{calls:.0f} calls of the kernels, which take {us / 1e3:.1f} ms" in text
    assert f"two cores, {us / calls:.0f} microseconds each" in text
    mlp, inception, _ = result("step-cpu", BENCHMARKS)["rows"]
    ours = mlp["added_seconds_median"]["bnjax"] / mlp["seconds_median"]["bnjax"]
    assert f"adds to the MNIST network is {100 * ours:.0f} % of its step" in text
    added = inception["added_seconds_median"]
    assert added["arrays"] / added["flax"] == pytest.approx(1 / 3, abs=0.05)
    assert added["arrays"] / added["bnjax"] == pytest.approx(1 / 2, abs=0.05)
    assert inception["beyond_arrays_over_flax"] == pytest.approx(1 / 2, abs=0.05)
    found = [
        row["added_by_sharing"]["bnjax"] / row["predicted"]["bnjax"]
        for row in result("scaling-cpu", BENCHMARKS)["rows"]["devices"]
        if row["devices"] > 1
    ]
    assert f"added {min(found):.1f} to {max(found):.1f} times what the bare" in text


@pytest.mark.parametrize("name", DRAWN)
def test_the_text_of_a_figure_is_inside_and_apart(name):
    path = DRAWN[name]
    module = importlib.import_module(f"{path.parts[-3]}.{name}")
    figure = module.draw(read_result(path))
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[i]
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[i]
        near = [texts[j] for j in range(i) if box.overlaps(boxes[j])]
        assert not near, (texts[i], near)
    if name == "scaling":
        shown = {text.get_text() for axes in figure.axes for text in axes.texts}
        cells = page("docs/library/performance.md").split(" | ")
        assert len(shown) > 20
        assert shown <= set(cells)
