"""The streaming path on CIFAR-10 (JPEG) with full augmentation: rates and memory.

    python -m benchmarks.streaming rate
    python -m benchmarks.streaming memory

`rate` measures the images per second and core (decoding, random crop, random
interpolation, mirroring, color changes), then the fraction of a step that waits for
input if the model needs 5 ms. The model is a sleep: like a device, it leaves the
processor to the input. `memory` draws 20,000 batches and records the memory of the
process and its workers. Both write to benchmarks/results/streaming_*.json. Each takes a
minute or two, and the data set must be prepared (see docs/programs/data.md).
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.config import AugmentConfig, DataConfig
from bnjax.data.pipeline import Feed, make_feed, stream_batches
from bnjax.data.sources import open_data
from bnjax.training.config import Config

RESULTS = ROOT / "benchmarks" / "results"
MEBIBYTE = 2**20
_OWN = ("Pss_Anon:", "Pss_Shmem:")


def make_config(batch_size: int, workers: int, prefetch: int, name: str) -> Config:
    data = DataConfig(
        name=name,
        path="streaming",
        workers=workers,
        prefetch=prefetch,
        augment=AugmentConfig(kind="crop"),
    )
    return Config(steps=1, batch_size=batch_size, learning_rate=0.1, data=data)


def images_per_second_and_core(config: Config, batches: int) -> float:
    """Read and augment in one thread; the time is the processor's, not the clock's."""
    cv2.setNumThreads(1)
    source = open_data(config.data)
    size = config.batch_size
    reader = stream_batches(config.data, source, size, size, (0, config.seed))
    for step in range(5):
        reader[step]
    started = time.process_time()
    for step in range(5, 5 + batches):
        reader[step]
    return batches * config.batch_size / (time.process_time() - started)


def take_steps(feed: Feed, steps: int, step_seconds: float) -> dict[str, float]:
    """Draw one batch a step and wait as long as the model needs."""
    waited = np.empty(steps)
    feed.chunk(0, 1)
    started = time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        feed.chunk(step + 1, 1)
        waited[step] = time.perf_counter() - before
        time.sleep(step_seconds)
    seconds = time.perf_counter() - started
    return {
        "steps_per_second": steps / seconds,
        "share_waiting": float(waited.sum() / seconds),
        "wait_ms_median": float(1000 * np.median(waited)),
        "wait_ms_99th_percentile": float(1000 * np.quantile(waited, 0.99)),
    }


def rate(
    batch_sizes: tuple[int, ...] = (16, 32, 64),
    workers: tuple[int, ...] = (0, 1, 2),
    steps: int = 1000,
    step_ms: float = 5.0,
    name: str = "cifar10_jpeg",
) -> None:
    """Measure images a second and core, and the share of a step spent waiting.

    Args:
        batch_sizes: Examples in a step.
        workers: Numbers of worker processes to try.
        steps: Steps with each.
        step_ms: How long the model needs.
        name: The data set.
    """
    config = make_config(100, 0, 4, name)
    per_core = images_per_second_and_core(config, 200)
    print(f"{per_core:,.0f} images/s and core")
    rows: list[dict[str, Any]] = []
    for size in batch_sizes:
        for count in workers:
            config = make_config(size, count, 8, name)
            feed = make_feed(
                config.data,
                open_data(config.data),
                batch_size=config.batch_size,
                key=jax.random.key(0),
            )
            row = {"batch_size": size, "workers": count}
            rows.append(row | take_steps(feed, steps, step_ms / 1000))
            feed.close()
            print(
                f"batch {size}, workers {count}: "
                f"{rows[-1]['share_waiting']:.1%} of a step waiting, "
                f"{rows[-1]['steps_per_second']:,.0f} steps/s"
            )
    result = {
        "data": name,
        "images_per_second_and_core": per_core,
        "model_step_ms": step_ms,
        "load_average_at_end": os.getloadavg()[0],
        "rows": rows,
    }
    report("rate", result)


def memory(
    batches: int = 20_000,
    batch_size: int = 8,
    workers: int = 1,
    name: str = "cifar10_jpeg",
) -> None:
    """Follow the memory of streaming over many batches.

    Args:
        batches: How many to draw.
        batch_size: Examples in each.
        workers: Worker processes, whose memory counts.
        name: The data set.
    """
    config = make_config(batch_size, workers, 4, name)
    feed = make_feed(
        config.data,
        open_data(config.data),
        batch_size=config.batch_size,
        key=jax.random.key(0),
    )
    samples = []
    for step in range(batches):
        feed.chunk(step, 1)
        if step % (batches // 40) == 0 or step == batches - 1:
            samples.append((step + 1, *resident_mebibytes()))
    feed.close()
    steps, run, all_workers = map(np.array, zip(*samples, strict=True))
    # The first tenth fills caches and starts workers.
    settled = steps > batches / 10
    total = (run + all_workers)[settled]
    slope = np.polyfit(steps[settled], total, 1)[0]
    result = {
        "data": name,
        "batches": batches,
        "batch_size": batch_size,
        "workers": workers,
        "mebibytes_after_a_tenth": float(total[0]),
        "mebibytes_at_end": float(total[-1]),
        "mebibytes_highest": float(total.max()),
        "growth_in_mebibytes_per_1000_batches": float(1000 * slope),
        "samples_step_run_workers": [[*map(float, row)] for row in samples],
    }
    print(
        f"{total[0]:,.1f} MiB after a tenth, {total[-1]:,.1f} at the end, "
        f"{total.max():,.1f} at most; {1000 * slope:+.3f} MiB per 1,000 batches"
    )
    report("memory", result)


def resident_mebibytes() -> tuple[float, float]:
    """Return what this process holds, and what its children hold together."""
    pids = [os.getpid(), *children(os.getpid())]
    sizes = [own_bytes(pid) / MEBIBYTE for pid in pids]
    return sizes[0], sum(sizes[1:])


def children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, file.read_text().split())


def own_bytes(pid: int) -> int:
    """Return a process's own memory: its heap, and its part of what is shared.

    Pages of files are left out: the kernel takes them back, and whose they are changes
    with whatever else the machine runs.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = [line.split()[1] for line in lines if line.startswith(_OWN)]
    return 1024 * sum(map(int, own))


def report(name: str, result: Any) -> None:
    command = " ".join(["python -m benchmarks.streaming", *sys.argv[1:]])
    path = RESULTS / f"streaming_{name}.json"
    write_result(path, command, [0], result)
    print(path)


if __name__ == "__main__":
    programs = {"rate": rate, "memory": memory}
    sys.exit(run_reporting(lambda: tyro.extras.subcommand_cli_from_dict(programs)))
