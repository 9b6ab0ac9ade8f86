"""What the pages say of results is what the result files hold."""

import functools
import importlib
import re
import statistics

import jax
import numpy as np
import pytest

import experiments.mnist
from benchmarks.figures import WITH, WITHOUT
from benchmarks.report import RESULTS as BENCHMARKS
from benchmarks.report import ROOT, percent, read_result
from benchmarks.timing import ratio
from bnjax.models import create
from bnjax.training.presets import PRESETS
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


def row(label, *cells):
    """Return a row of a table of the page."""
    return " ".join(f"| {' | '.join([label, *cells])} |".split())


def shared_row(label, values):
    """Return a row of shares: | label | 1.0 % | 2.0 % |."""
    return row(label, *(f"{percent(value)} %" for value in values))


def mnist(r):
    runs, compared = r["runs"], r["comparison"]
    steps = runs[WITH][0]["steps"]
    for step in (10_000, 50_000):
        at = steps.index(step)
        ends = (middle(runs[n], "test_accuracy", at) for n in BOTH)
        yield shared_row(f"{step:,}", ends)
    assert compared["steps_where_median_with_is_not_above"] == []
    below = compared["steps_where_with_is_not_above_by_seed"]
    ((seed, (step,)),) = ((seed, at) for seed, at in below.items() if at)
    every = len(steps) * len(below)
    yield f"at all {len(steps)} evaluations"
    yield f"at {every - 1} of {every}: the exception is seed {seed} at step {step:,}"
    yield f"after {compared['steps_with_to_reach_final_without']:,} steps"
    inputs = [r["inputs_of_the_last_hidden_layer"][name] for name in BOTH]
    spans = (each["all_units_median_span"]["50"] for each in inputs)
    share = (f"{each['all_units_span_over_mean_width']['50']:.2f}" for each in inputs)
    yield f"over {steps[-1]:,} steps"
    yield "by {:.2f} with batch normalization and by {:.2f} without".format(*spans)
    yield f"{joined(share)} of the distance between the 15th and 85th percentile"
    yield f"first {experiments.mnist.EXAMPLES:,} test examples"
    yield f"every {experiments.mnist.EVERY} steps of seed {inputs[0]['seed']}"
    costs = [100 * each["recording_share_of_training_time"] for each in inputs]
    yield f"took {min(costs):.1f} to {max(costs):.1f} % of the time"
    yield from other_settings(r["settings"])
    ends = [100 * run["test_accuracy"][-1] for run in runs[WITHOUT]]
    yield f"five seeds range from {min(ends):.2f} to {max(ends):.2f}"


def other_settings(rows):
    config = PRESETS["mnist"].config
    yield (
        f"a learning rate of {config.learning_rate} and a standard deviation of "
        f"{config.model.weight_std}"
    )
    yield "after 10,000 and after 50,000 steps"
    for both in zip(rows[1::2], rows[::2], strict=True):
        cells = [f"{both[0]['learning_rate']:g}"]
        for each, name in zip(both, (WITHOUT, WITH), strict=True):
            assert each["network"] == name
            for now, then in (("at_10000", "at_10000"), ("at_end", "at_50000")):
                values = each[f"accuracy_{now}"], each[f"known_{then}"]
                cells += ["{:.2f} ({:.2f})".format(*values)]
        yield row(f"{both[0]['weight_std']:g}", *cells)
    far = [each for each in rows if abs(each["difference_at_end"]) > 0.3]
    assert (len(rows) - len(far), len(rows)) == (9, 12)
    yield "Nine of the twelve are within 0.3 points"
    for each in far:
        name = "with" if each["network"] == WITH else "without"
        std, rate = f"{each['weight_std']:g}", f"{each['learning_rate']:g}"
        yield f"{name} at {std} and {rate} ({-each['difference_at_end']:.2f} lower"


def inception(r):
    last = r["runs"]["Inception"][0]["steps"][-1]
    yield f"{last:,} steps of {r['examples_in_a_step']} examples"
    sweep = r["sweep_of_inception"]
    best = max(sweep, key=lambda run: run["test_accuracy"][-1])["learning_rate"]
    config = PRESETS["cifar10-inception"].config
    assert config.learning_rate == best
    rates = joined([f"{run['learning_rate']}" for run in sweep])
    yield f"a rate of {best}, the best of {rates}"
    yield f"after {sweep[0]['steps'][-1]:,} steps"
    for name, each in r["table"].items():
        steps = each["steps_to_best_of_inception"]
        chance = " (chance)" * (each["best_accuracy"] == 0.1)
        cells = [f"{percent(each['best_accuracy'])} %{chance}", "never", ""]
        if steps:
            over = each["over_steps_of_inception"]
            cells[1:] = f"{steps:,}", f"{round(over, 2):g}"
        share, accuracy = cifar10.PAPER[name]
        if accuracy and accuracy > 1:
            cells += [f"{round(share, 2):g}" if share else "never", f"{accuracy} %"]
        else:
            cells += ["", "chance" if accuracy else "overflows"]
        yield row(name, *cells)
    fifth = r["in_a_fifth_of_the_steps"]
    ours, sigmoids = (fifth[name] for name in ("BN-x5", "BN-x5-Sigmoid"))
    decay = PRESETS["cifar10-bn-x5"].config.optim.schedule_options["decay_rate"]
    yield f"({ours['steps']:,} steps, {decay} every {ours['decay_steps']})"
    best = percent(r["table"]["Inception"]["best_accuracy"])
    yield f"{shares(sigmoids['accuracy'])} % for three seeds, above Inception's {best}"
    yield f"BN-x5 reaches {shares(ours['accuracy'])} % in them"
    paper = PRESETS["inception"].config.learning_rate
    assert config.learning_rate == pytest.approx(20 * paper)
    network = create("inception", classes=10, width=0.125, stem="small")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
    init = functools.partial(network.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    sizes = [
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(params)
        if "scale" in jax.tree_util.keystr(path)
    ]
    yield f"{min(sizes)} to {max(sizes)} channels"


def scale_invariance(r):
    exact, usual = r["epsilon 1e-20"].values(), r["epsilon 1e-5"].values()
    large = max(e for of in usual for e, a in zip(of, r["a"], strict=True) if a >= 1)
    assert (r["a"][0], r["a"][-1], f"{large:.0e}") == (1e-3, 1e3, "1e-05")
    yield "for a from 1e-3 to 1e3 in float32"
    yield f"to {1e7 * max(map(max, exact)):.1f}e-7 with an epsilon of 1e-20"
    yield "With an epsilon of 1e-5 the equations hold for a of 1 and above (to 1e-5)"
    small = next(iter(usual))[0]
    yield f"at a = 1e-3 the weights' scale is lost to epsilon ({small:.2f})"


def jacobian(r):
    small, large = (
        [each[n]["hidden layer 2 to 3"]["percentiles"]["50"] for n in BOTH]
        for each in (r["weight_std 0.01"], r["weight_std 0.1"])
    )
    (start,) = {f"{values[0]:.1f}" for values in small + large}
    yield "are close to 1 with batch normalization"
    yield f"is {start} with and without batch normalization"
    yield f"after {r['steps'][-1]:,} steps"
    for std, ends in (("0.01", small), ("0.1", large)):
        with_, without = (values[-1] for values in ends)
        yield row(std, f"{with_:.2f}", f"{without:.{2 if without > 0.01 else 3}f}")
    yield "are closer to 1 with batch normalization than without"
    yield "only the largest are close to 1"


def bias_drift(r):
    found, steps = r["mean outside the gradient"], r["steps"][-1]
    assert found["range_of_loss_in_second_half"] < 1.5e-4
    inside = r["mean inside the gradient"], r["batch normalization (both inside)"]
    assert max(abs(b) for each in inside for b in each["bias"]) < 1e-4
    each, final = found["bias_per_step_in_second_half"], found["final_bias"]
    yield f"by {each:.4f} in each of {steps:,} steps, to {final:.0f}"
    yield "the loss moves by 1e-4 in the second half"
    yield "the bias stays below 1e-4"


def small_batches(r):
    columns = [
        [middle(runs, mode) for runs in r[name].values()]
        for name, mode in (
            (WITH, batch_size.INFERENCE),
            (WITHOUT, batch_size.INFERENCE),
            (WITH, batch_size.TRAINING),
        )
    ]
    yield f"after {r['examples_seen']:,} examples"
    for size, values in zip(r[WITH], zip(*columns, strict=True), strict=True):
        yield shared_row(size, values)
    with_, without = (span(column[3:]) for column in columns[:2])
    yield "With batches of 16 and more"
    yield f"{with_} % with batch normalization and {without} % without"
    of_2 = span([run[batch_size.INFERENCE] for run in r[WITH]["2"]])
    yield f"of 2, the three seeds range from {of_2} %"
    assert "1" not in r[WITH]
    yield "A batch of 1 is refused"


def changes(r):
    reference = ""
    for name, each in r["table"].items():
        reference = name if name.startswith("BN-x5") else reference
        points = f"{each['points_from_reference']:+.1f}"
        cells = f"{percent(each['accuracy'])} %", points
        yield row(name, *(cells if name != reference else (cells[0], "")))
    yield "except the smaller L2 weight"


def depth(r):
    yield f"after {r['steps']} steps"
    yield "More than 100 layers"
    for name, each in r["table"].items():
        network, rate = name.split(", ")
        network, _, how = network.partition(" ")
        cells = [network, how.partition(" ")[0], rate]
        cells += [f"{each['train_loss_of_last_tenth']:.2f}"]
        accuracy = each["test_accuracy"]
        cells += ["not finite" if accuracy is None else f"{percent(accuracy)} %"]
        yield row(*cells)
        assert (accuracy is None) == ("not finite" in (each["diverged"] or ""))
    yield f"chance is {np.log(10):.3f}"


def lenet(r):
    ours, flax, without = r["table"].values()
    assert ours["test_accuracy"] == flax["test_accuracy"]
    rates = [rate for row in r["table"].values() for rate in row["examples_per_second"]]
    yield "a learning rate of 1"
    yield f"{len(r['runs']['bnjax'][0]['steps'])} epochs"
    both = (percent(each["median_test_accuracy"]) for each in (ours, without))
    yield "{} % with batch normalization, {} % without".format(*both)
    yield f"about {round(statistics.median(rates), -3):,.0f} examples/s"


def ensemble(r):
    for crops, found in r["by_crops"].items():
        members = [member["test_accuracy"] for member in found["members"]]
        together = percent(found["test_accuracy"])
        yield row(crops, f"{span(members)} %", f"{together} %")
    yield "GoogLeNet's 144 crops"
    yield "144 crops of a 32x32 image lose"


def algorithm_2(r):
    names = (population.MOVING, population.PAPER, population.POOLED)
    for step in (100, 200, 500):
        at = r["steps"].index(step)
        yield shared_row(f"{step}", (middle(r["after_steps"], n, at) for n in names))
    at, runs = r["averaged_steps"].index(100), r["averaged_parameters"]
    stale, own = (middle(runs, n, at) for n in (population.STALE, population.OWN))
    yield f"After 100 steps, averaged parameters reach {percent(stale)} %"
    yield f"{percent(own)} % with pooled statistics of their own"
    sizes = r["batch_sizes"].values()
    moving, paper, pooled = ([middle(runs, n) for runs in sizes] for n in names)
    first, *_, last = r["batch_sizes"]
    yield f"After {r['examples_seen']:,} examples with batches of {first} to {last}"
    gains = (
        span([new - old for new, old in zip(each, moving, strict=True)])
        for each in (paper, pooled)
    )
    yield "gains {} points and its pooled variant {} points".format(*gains)


def domains(r):
    words = ("", "faint", "noisy", "blurred", "inverted")
    for word, each in list(zip(words, r["median"].values(), strict=True))[1:]:
        yield shared_row(word, [each[adabn.TRAINING], each[adabn.ALL]])


def populations(r):
    inverted, noisy = r["table"]["populations"].values()
    for label, name in (
        ("one population", kinds.TOGETHER),
        ("one population, each kind normalized apart in training", kinds.APART),
        ("two populations, one scale and bias", kinds.SHARED),
        ("two populations, two scales and biases", kinds.OWN),
    ):
        yield shared_row(label, inverted[name])
    both = (noisy[name][1] for name in (kinds.TOGETHER, kinds.OWN))
    yield "{} and {} % of the noisy images".format(*map(percent, both))
    random, by_class = r["table"]["adaptation"].values()
    at = {weight: r["weights"].index(weight) for weight in ("0", "64", "inf")}
    trained, adapted = random["500"][at["inf"]], r["table"][kinds.ADABN]
    yield f"{percent(trained)} % by the statistics of training"
    yield f"{percent(adapted)} % by AdaBN"
    for size in ("500", "20", "4"):
        yield shared_row(size, [random[size][at[weight]] for weight in ("0", "64")])
    yield "blended at N = 64"
    yield f"batches of 500 of one class it is {percent(by_class['500'][at['0']])} %"


def smooth(r):
    for data, table in r["table"].items():
        for network in smoothness.NETWORKS:
            cells = [
                write(table[network][name]["median"])
                for name, write in (
                    ("range_of_loss", "{:.2f}".format),
                    ("beta_geometric_mean", "{:.2f}".format),
                    ("shift_cosine", "{:.2f}".format),
                    ("test_accuracy", lambda share: f"{percent(share)} %"),
                )
            ]
            yield row(data, network, *cells)
    yield "theirs had up to 25"


def renormalized(r):
    yield f"after {r['examples_seen']:,} examples"
    for case, word in (
        ("2", "2"),
        ("4", "4"),
        ("32 of one class", "32, all of one class"),
    ):
        ends = [
            middle(r["runs"][case][name], "test_accuracy")
            for name in (WITH, renorm.RENORM, WITHOUT)
        ]
        yield shared_row(word, ends)


def recurrence(r):
    for name, runs in r.items():
        steps = runs[WITH][0]["steps"]
        label = f"{re.search(r'[0-9]+', name)[0]} {name.split()[0]}"
        for at in (0, -1):
            both = [middle(runs[n], "test_accuracy", at) for n in BOTH]
            cells = f"{steps[at]}", *(f"{percent(share)} %" for share in both)
            yield row(label, *cells)
        times = ([run["seconds_per_step"] for run in runs[n]] for n in BOTH)
        yield f"{ratio(*times):.1f} times as long with {name.split()[0]}"


def whitened(r):
    for name, each in r["median"].items():
        accuracies = each["running statistics"]
        yield shared_row(name, [accuracies[0], accuracies[-1]])
    yield f"after {r['steps'][0]} steps"
    yield f"after {r['steps'][-1]:,} steps"


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
PAGE = "docs/programs/experiments.md"
# What has digits and is no result: names, and references to the literature.
NAMES = r"\]\([^)]*\)|\w+\.json|CIFAR-10|ResNet-\d+|BN-x\d+"
REFERENCES = (
    r"[Ss]ections? \d(\.\d)*|Figures? \d[a-c]?((, | and )(\d|[a-c]))*|Algorithm 2"
    r"|(Ioffe|et al\.) 20\d\d"
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def sections():
    """Return the page's sections, the one before the first heading as well."""
    return [
        re.sub(r"\s+", " ", each)
        for each in re.split(r"^## ", (ROOT / PAGE).read_text("utf-8"), flags=re.M)
    ]


def without_names(text):
    return re.sub(f"{NAMES}|{REFERENCES}", "", text)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_number_of_a_claim_is_derived_from_its_file(name):
    (text,) = (each for each in sections() if f"/results/{name}.json)" in each)
    record = read_result(RESULTS / f"{name}.json")
    assert record["machine"]["platform"] == "cpu"
    command = rf"\*\*Command\.\*\* `{record['command']}`, [a-z ]*\d+ (seconds|minutes)"
    command += r"( to train and \d+ minutes to score)?\."
    assert re.search(command, text)
    left = re.sub(command, "", text)
    for phrase in CLAIMS[name](record["result"]):
        assert phrase in text
        left = left.replace(phrase, "")
    left = without_names(left)
    assert not re.search(r"\d", left), left
    seeds = NUMBERS[len(record["seeds"])]
    found = re.findall(r"[Mm]edians? (?:of|over) (\w+) seeds", text)
    assert set(found) <= {seeds}
    assert ("One seed" in text) == (seeds == "one" and not found)
    if name in DRAWN:
        assert f"](../figures/{name}.png)" in text


def test_no_number_is_outside_the_sections_of_the_claims():
    for text in sections():
        if "/results/" not in text:
            assert not re.search(r"\d", without_names(text)), text


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
    most = (
        f"at most {max(traffic):.2f} times the traffic there and {max(on_gpu):.2f} on"
    )
    for name in ("docs/library/compiled.md", "docs/variants/ghost.md"):
        text = page(name)
        assert f"take {min(cycles):.2f} to {max(cycles):.2f} times the cycles" in text
        assert most in text


def test_what_whitening_costs():
    small, large = (
        [share for name, share in row["ratios"].items() if name != "batch norm"]
        for row in result("whitening-cpu", BENCHMARKS)["rows"]
    )
    text = page("docs/variants/whitening.md")
    times = "{:.1f} to {:.1f} times as long"
    first = times.format(min(small), max(small)) + " as batch normalization with 64 ch"
    assert first in text
    assert times.format(min(large), max(large)) + " with 256 channels" in text


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
