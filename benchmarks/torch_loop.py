"""The mnist network in plain PyTorch, for training_rate.py; needs torch and numpy.

    python torch_loop.py DATA.npz SEED BATCH RATE

For each line "N" on standard input, it takes N steps and prints the seconds. It uses
one thread or all threads, whichever is faster at the start.
"""

import itertools
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def network() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (784, 100, 100):
        linear = nn.Linear(size, 100, bias=False)
        nn.init.normal_(linear.weight, std=0.01)
        layers += [linear, nn.BatchNorm1d(100, momentum=0.01), nn.Sigmoid()]
    logits = nn.Linear(100, 10)
    nn.init.normal_(logits.weight, std=0.01)
    nn.init.zeros_(logits.bias)
    return nn.Sequential(*layers, logits)


def batches(examples: int, batch: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.randperm(examples)[: examples // batch * batch].split(batch)


def main(path: str, seed: int, batch: int, rate: float) -> None:
    torch.manual_seed(seed)
    with np.load(path) as data:
        images = torch.from_numpy(data["images"])
        labels = torch.from_numpy(data["labels"]).long()
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    cross_entropy = nn.CrossEntropyLoss()
    rows = batches(len(labels), batch)

    def take(steps: int) -> float:
        started = time.perf_counter()
        loss = torch.zeros(())
        for chosen in itertools.islice(rows, steps):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
        loss.item()
        return time.perf_counter() - started

    def with_threads(count: int) -> float:
        torch.set_num_threads(count)
        take(50)
        return take(200)

    # On matrices this small one thread may be faster than all.
    counts = {1, torch.get_num_threads()}
    torch.set_num_threads(min(counts, key=with_threads))
    for line in sys.stdin:
        print(take(int(line)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
