"""Time of a layer's training pass as batch, channels and devices grow.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --quick

Batch and channels grow on one device, in reused buffers. On 1, 2, 4 and 8 devices, each
device has the same number of examples, and the layer shares its statistics (axis_name)
or not: the difference is the cost of the collectives. The result also has their count
and bytes in the compiled program, and the time of as many bare all-reduces of as many
bytes. A CPU is split into eight devices that share its cores. Our layer and Flax's run
in turns. Writes benchmarks/results/scaling-<platform>.json and
docs/figures/scaling.png; with --quick it writes only to --output, if that is given.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import bnjax.linen
from benchmarks import hlo, peers, timing
from benchmarks.layer import measured
from benchmarks.peers import Case
from benchmarks.report import markdown, milliseconds, run_command, write_run

AXIS = "batch"
LIBRARIES = {"bnjax": bnjax.linen.BatchNorm, "flax.linen": linen.BatchNorm}
BATCHES, CHANNELS, DEVICES = (8, 16, 32, 64, 128), (16, 64, 256, 1024), (1, 2, 4, 8)
QUICK_BATCHES, QUICK_CHANNELS, QUICK_DEVICES = (2, 4), (8, 16), (1, 2)


def compare(
    batches: tuple[int, ...] = BATCHES,
    channels: tuple[int, ...] = CHANNELS,
    devices: tuple[int, ...] = DEVICES,
    device_shape: tuple[int, int, int, int] = (8, 14, 14, 256),
    rounds: int = 15,
    seconds: float = 2.0,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Measure, print, write and draw.

    Args:
        batches: Sizes, of images of 14x14 with 128 channels.
        channels: Of 16 images of 14x14.
        devices: That share a batch; those that are not there are left out.
        device_shape: Of the input of each of the devices.
        rounds: Of each program, at most.
        seconds: Of each comparison, after three rounds.
        quick: Two small sizes of each.
        output: Where to write the result instead, without a figure.
    """
    if quick:
        batches, channels, devices = QUICK_BATCHES, QUICK_CHANNELS, QUICK_DEVICES
        rounds, seconds, device_shape = min(rounds, 3), min(seconds, 0.1), (2, 4, 4, 8)
    load = timing.load()
    shapes = {
        "batch": [(size, 14, 14, 128) for size in batches],
        "channels": [(16, 14, 14, size) for size in channels],
    }
    rows: dict[str, list[dict[str, Any]]] = {
        name: [
            measured(Case(shape), "train", "reused", list(LIBRARIES), rounds, seconds)
            for shape in several
        ]
        for name, several in shapes.items()
    }
    present = [count for count in devices if count <= len(jax.devices())]
    rows["devices"] = [
        over_devices(count, device_shape, rounds, seconds) for count in present
    ]
    result = {
        "devices_absent": [count for count in devices if count not in present],
        "load_average_at_start": load,
        "rows": rows,
    }
    record = write_run("scaling", result, tables(result), output, quick=quick)
    if record is not None and output is None:
        from benchmarks.figures import save  # noqa: PLC0415 (matplotlib)

        print(save(draw(record), "scaling"))


def over_devices(
    count: int, shape: tuple[int, ...], rounds: int, seconds: float
) -> dict[str, Any]:
    """Time a training pass over `count` devices, each with an input of `shape`."""
    mesh = Mesh(jax.devices()[:count], (AXIS,))
    case = Case((count * shape[0], *shape[1:]))
    values = {name: jnp.asarray(value) for name, value in peers.arrays(case).items()}
    runs: dict[str, Callable[[], Any]] = {}
    collectives = {}
    for library in LIBRARIES:
        for shares in (True, False):
            name = f"{library}, {'shared' if shares else 'local'}"
            function = sharded(train_pass(library, shares, values), mesh)
            runs[name], text = compiled(function, values["x"], values["dy"])
            if shares:
                collectives[library] = hlo.collectives(hlo.parse(text))
    # A layer's collective: the sums of its channels, once by itself.
    sums = jnp.zeros((count, 2, shape[-1]))
    bare = sharded(lambda sums, _: lax.psum(sums, AXIS), mesh)
    runs["all-reduce"], _ = compiled(bare, sums, sums)
    idle = sharded(lambda sums, _: sums * 2, mesh)
    runs["no all-reduce"], _ = compiled(idle, sums, sums)
    times = timing.interleaved(runs, rounds, seconds=seconds)
    one = statistics.median(
        with_it - without
        for with_it, without in zip(
            times["all-reduce"], times["no all-reduce"], strict=True
        )
    )
    added = {
        library: statistics.median(
            shared - local
            for shared, local in zip(
                times[f"{library}, shared"], times[f"{library}, local"], strict=True
            )
        )
        for library in LIBRARIES
    }
    return {
        "devices": count,
        "shape_of_a_device": list(shape),
        "seconds_median": timing.medians(times),
        "collectives": collectives,
        "all_reduce_seconds": one,
        "added_by_sharing": added,
        "predicted": {
            library: found["count"] * one for library, found in collectives.items()
        },
        "rounds": len(times["all-reduce"]),
        "seconds": times,
    }


def train_pass(
    library: str, shares: bool, values: dict[str, jax.Array]
) -> Callable[[jax.Array, jax.Array], Any]:
    """Return forward and backward of a layer on one device's part of the batch."""
    layer = LIBRARIES[library](
        use_running_average=False, axis_name=AXIS if shares else None
    )

    def train(x, dy):
        params = {name: values[name] for name in ("scale", "bias")}
        # Varying: without the sum of the gradients over devices that training adds.
        params = lax.pcast(params, AXIS, to="varying")
        state = {name: values[name] for name in ("mean", "var")}

        def forward(params, x):
            variables = {"params": params, "batch_stats": state}
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        y, pull, new = jax.vjp(forward, params, x, has_aux=True)
        y, dy = lax.optimization_barrier((y, dy))
        dparams, dx = pull(dy)
        vectors = jax.tree.map(lambda vector: vector[None], (dparams, new))
        return y, dx, vectors

    return train


def sharded(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Map a function over the devices, its first axes split."""
    spec = PartitionSpec(AXIS)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)


def compiled(
    function: Callable[..., Any], *args: jax.Array
) -> tuple[Callable[[], Any], str]:
    """Compile; return how to run it and its HLO."""
    program = jax.jit(function).lower(*args).compile()
    placed = [
        jax.device_put(value, sharding)
        for value, sharding in zip(args, program.input_shardings[0], strict=True)
    ]
    return lambda: jax.block_until_ready(program(*placed)), program.as_text() or ""


def tables(result: dict[str, Any]) -> list[str]:
    """Return the times, and what sharing statistics adds, as Markdown."""
    found = []
    for name in ("batch", "channels"):
        lines = [
            [
                row["shape"],
                *(milliseconds(row["seconds_median"][of]) for of in LIBRARIES),
            ]
            for row in result["rows"][name]
        ]
        if lines:
            title = f"Milliseconds by {name}, on one device:"
            found += [title, markdown(["shape", *LIBRARIES], lines)]
    lines = [
        [
            str(row["devices"]),
            library,
            milliseconds(row["seconds_median"][f"{library}, shared"]),
            milliseconds(row["added_by_sharing"][library]),
            milliseconds(row["predicted"][library]),
            str(collectives["count"]),
            str(collectives["bytes"]),
        ]
        for row in result["rows"]["devices"]
        for library, collectives in row["collectives"].items()
    ]
    header = ["devices", "library", "ms", "added by sharing", "predicted"]
    return [
        *found,
        "Milliseconds by devices, with the same input on each, and the all-reduces:",
        markdown([*header, "count", "bytes"], lines),
    ]


def draw(record: dict[str, Any]) -> Any:
    """Draw time against batch, channels and devices, the quartiles as bands."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 (as below)

    from benchmarks.figures import mark, new_figure  # noqa: PLC0415 (matplotlib)

    rows, cores = record["result"]["rows"], record["machine"]["cores"]
    shape = " x ".join(map(str, rows["devices"][0]["shape_of_a_device"]))
    titles = {
        "batch": ("one device, N x 14 x 14 x 128", "examples N"),
        "channels": ("one device, 16 x 14 x 14 x C", "channels C"),
        "devices": (f"shared, {shape} each", f"devices on {cores} cores"),
    }
    figure, panels = new_figure(3)
    for axes, (name, (title, label)) in zip(panels, titles.items(), strict=True):
        devices, axis = name == "devices", 0 if name == "batch" else -1
        sizes = [
            row["devices"] if devices else int(row["shape"].split("x")[axis])
            for row in rows[name]
        ]
        for color, library in zip(("C0", "C1"), LIBRARIES, strict=True):
            run = f"{library}, shared" if devices else library
            times = [1e3 * np.asarray(row["seconds"][run]) for row in rows[name]]
            low, middle, high = np.transpose(
                [np.quantile(each, (0.25, 0.5, 0.75)) for each in times]
            )
            axes.fill_between(sizes, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(sizes, middle, "o-", color=color, ms=4, label=library)
            offset = (4, -5) if library == "bnjax" else (-4, 5)
            for size, time, row in zip(sizes, middle, rows[name], strict=True):
                figure_of_table = milliseconds(row["seconds_median"][run])
                mark(axes, (size, time), figure_of_table, color, offset)
        axes.set(title=title, xlabel=label, xscale="log", yscale="log")
        axes.set_xlim(sizes[0] / 2.5, sizes[-1] * 2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(y=0.12)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(loc="upper left")
    figure.suptitle(
        "Batch normalization, forward and backward in float32, one seed: "
        "median and quartiles of the rounds"
    )
    return figure


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    run_command(compare)
