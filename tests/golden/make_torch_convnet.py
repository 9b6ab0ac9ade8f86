"""Writes torch_convnet.npz: a small convolutional network trained by PyTorch.

Run by hand, in an environment with PyTorch (the CPU wheel is enough):

    python tests/golden/make_torch_convnet.py
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("torch_convnet.npz")
SEED = 7
STEPS = 8
COMPARED = 2
LEARNING_RATE = 0.1


def network():
    """Returns convolutions, grouped and transposed too, and a flattened map, with BN.

    The names in its state dict say nothing of the layers.
    """
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False),
        nn.BatchNorm2d(6, momentum=0.3, eps=1e-3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def state_of(model, prefix: str) -> dict[str, np.ndarray]:
    """Returns copies of a model's arrays."""
    state = model.state_dict().items()
    return {f"{prefix}/{name}": value.numpy().copy() for name, value in state}


def convnet_arrays() -> dict[str, np.ndarray]:
    """Returns images, labels, what the trained network gives, and its states.

    `x` (STEPS, batch, channels, height, width) and `labels` (STEPS, batch) hold a batch
    a step. "trained/..." is the state before the last COMPARED steps, `logits` what it
    gives in evaluation for x[0]; `loss` and "after_1/..." are of those steps.
    """
    import torch

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    x = rng.normal(1.0, 2.0, (STEPS, 16, 3, 8, 8)).astype(np.float32)
    labels = rng.integers(0, 3, (STEPS, 16))
    arrays = {"x": x, "labels": labels}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        compared = step - (STEPS - COMPARED)
        if compared == 0:
            arrays |= state_of(model, "trained")
            model.eval()
            with torch.no_grad():
                arrays["logits"] = model(torch.tensor(x[0])).numpy()
            model.train()
        logits = model(torch.tensor(x[step]))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if compared >= 0:
            losses.append(loss.item())
            arrays |= state_of(model, f"after_{compared + 1}")
    return arrays | {"loss": np.array(losses)}


def main() -> None:
    """Writes the file."""
    np.savez_compressed(PATH, **convnet_arrays())


if __name__ == "__main__":
    main()
