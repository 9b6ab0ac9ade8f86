"""Steps, compile time, scaling and the tables, at the smallest sizes."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_time, kernels, scaling, step, table
from benchmarks.networks import (
    KINDS,
    NETWORKS,
    Stack,
    batch_of,
    first_state,
    initial,
    loss_of,
)
from benchmarks.report import RESULTS, read_result


@pytest.mark.slow
def test_step(tmp_path):
    path = tmp_path / "step-cpu.json"
    step.compare(
        networks=("mlp",),
        batch_size=4,
        stack_layers=2,
        stack_shape=(2, 4, 4, 8),
        rounds=1,
        output=path,
    )
    result = read_result(path)["result"]
    (row,) = result["rows"]
    assert set(row["seconds_median"]) == {"bnjax", "flax", "none", "arrays"}
    with_bn, without = (row["seconds"][kind] for kind in ("bnjax", "none"))
    assert row["added_seconds_median"]["bnjax"] == with_bn[0] - without[0]
    assert row["bytes"]["bnjax"]["peak"] > row["bytes"]["bnjax"]["temporary"]
    # By layer the input, the output of the convolution and the kernel, in bfloat16;
    # then the float32 array of the loss, and vectors.
    arrays = 2 * (2 * 256 + 3 * 3 * 8 * 8) * 2 + 256 * 4
    assert arrays <= result["kept"]["bnjax"]["kept"] < arrays + 512
    assert result["kept"]["kept_over_flax"] < 0.55
    assert "| mlp | 4x28x28x1 | bnjax |" in table.tables(tmp_path)


def test_the_arrays_of_bn_are_two_parameters_two_statistics_and_their_momentum():
    network = NETWORKS["mlp"]
    images, _ = batch_of(network)
    state = first_state(network.create("none"), images)
    found = step.arrays_of_bn(network, images, jax.tree.leaves(state))
    # Three layers of 100: scale, mean, var and a momentum of scale. Bias is in both.
    assert sorted(array.shape for array in found) == [(100,)] * 12


def test_what_is_added_has_no_ratio_where_noise_hides_it():
    assert step.over([1.0, 2.0, 9.0], [4.0, 1.0, 5.0]) == 0.5
    assert step.over([1.0], [-0.1]) is None


def test_bytes_kept_are_those_of_distinct_arrays():
    def loss(params, stats, x, _):
        del stats
        # Both products keep x and the parameter, which is not counted.
        return jnp.sum(params * x) + jnp.sum(params * x), None

    x = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    assert step.residual_bytes(loss, x, {}, x) == 16


def test_compile_time(tmp_path):
    path = tmp_path / "compile_time-cpu.json"
    compile_time.compare(layers=1, networks=("dense",), rounds=1, output=path)
    (row,) = read_result(path)["result"]["rows"]
    for seconds in row["seconds"].values():
        (total,) = seconds["total"]
        assert total == sum(seconds[stage][0] for stage in compile_time.STAGES) > 0
    assert "| dense | bnjax / flax |" in table.tables(tmp_path)


def test_a_stack_has_its_layers():
    x = jnp.zeros((2, 4))
    stack = Stack(3, 4, KINDS["bnjax"], dense=True)
    variables = initial(stack, x)
    assert len(variables["stats"]) == 3
    loss, updates = loss_of(stack)(*variables.values(), x, None)
    assert loss >= 0
    assert len(updates["batch_stats"]) == 3


@pytest.mark.slow
def test_scaling(tmp_path):
    path = tmp_path / "scaling-cpu.json"
    scaling.compare(
        batches=(1,),
        channels=(),
        devices=(2, 999),
        device_shape=(2, 3, 3, 8),
        rounds=1,
        output=path,
    )
    result = read_result(path)["result"]
    assert result["devices_absent"] == [999]
    (row,) = result["rows"]["devices"]
    # Two moments of eight channels, and two sums of the gradient.
    assert row["collectives"]["bnjax"] == {"count": 2, "bytes": 4 * 8 * (2 + 2)}
    assert row["predicted"]["bnjax"] == 2 * row["all_reduce_seconds"]
    assert [row["shape"] for row in result["rows"]["batch"]] == ["1x14x14x128"]
    assert "| 2 | bnjax |" in table.tables(tmp_path)


def test_kernels(tmp_path):
    path = tmp_path / "kernels-cpu.json"
    kernels.compare(shapes=("8x4",), dtypes=("float32",), networks=(), output=path)
    ours, theirs = read_result(path)["result"]["rows"]
    assert (ours["library"], theirs["library"]) == kernels.LIBRARIES
    assert any("fusion" in kernel["name"] for kernel in ours["kernels"])
    assert "| 8x4 | float32 | bnjax |" in table.tables(tmp_path)


def test_kernels_of_a_library_without_jax():
    with pytest.raises(ValueError, match=r"--libraries torch: .* some of bnjax"):
        kernels.compare(libraries=("torch",))


def test_kernels_are_told_from_the_runtime_and_from_loops():
    def event(name, dur):
        return {"ph": "X", "name": name, "dur": dur}

    events = [
        event("add_fusion.1", 3.0),
        event("copy.2", 8.0),
        event("add_fusion.1", 7.0),
        event("while.3", 99.0),
        event("ThunkExecutor::Execute", 99.0),
        event("end: copy.2", 99.0),
        {"ph": "M", "name": "process_name"},
    ]
    assert kernels.totals(events, 2) == [
        {"name": "add_fusion.1", "calls": 1.0, "us": 5.0},
        {"name": "copy.2", "calls": 0.5, "us": 4.0},
    ]


def test_kernels_of_a_step_are_taken_together_by_name():
    profile = [
        {"name": name, "calls": 1.0, "us": us}
        for name, us in (("copy", 5.0), ("ffi_call.12", 4.0), ("ffi_call", 3.0))
    ]
    assert kernels.alike(profile) == [
        {"name": "ffi_call", "calls": 2.0, "us": 7.0},
        {"name": "copy", "calls": 1.0, "us": 5.0},
    ]


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_the_pages_have_the_tables_of_the_results(page):
    assert table.replaced(page, table.PAGES[page](RESULTS)) == page.read_text("utf-8")
