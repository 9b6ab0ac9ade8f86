"""Writes torch_batch_norm.npz: what PyTorch's batch normalization gives.

Run by hand, in an environment with PyTorch (the CPU wheel is enough):

    python tests/golden/make_torch_golden.py
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import torch

PATH = pathlib.Path(__file__).with_name("torch_batch_norm.npz")
STEPS = 3
NETWORK_SEED = 1000
NETWORK_STEPS = 5
NETWORK_LEARNING_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Spec:
    """One case: the layer's arguments and how its input is drawn."""

    shape: tuple[int, ...]
    dtype: str
    affine: bool
    momentum: float
    eps: float
    offset: float
    seed: int

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        affine = "affine" if self.affine else "plain"
        return (
            f"{shape}-{self.dtype}-{affine}-momentum{self.momentum:g}"
            f"-eps{self.eps:g}-mean{self.offset:g}"
        )


def specs() -> list[Spec]:
    """Returns every case: four shapes, two dtypes and four settings of the layer."""
    shapes = [(8, 3), (2, 3), (4, 5, 6, 6), (3, 4, 2, 3, 3)]
    dtypes = ["float32", "float64"]
    settings = [
        {"affine": True, "momentum": 0.1, "eps": 1e-5, "offset": 0.0},
        {"affine": False, "momentum": 0.3, "eps": 1e-3, "offset": 0.0},
        {"affine": True, "momentum": 0.3, "eps": 1e-3, "offset": 100.0},
        {"affine": False, "momentum": 0.1, "eps": 1e-5, "offset": 100.0},
    ]
    # dx of two values a hundred deviations from zero is all cancellation: PyTorch's
    # float32 is off by 1e-4 there, so that it is no reference.
    cases = [
        (shape, dtype, setting)
        for shape, dtype, setting in itertools.product(shapes, dtypes, settings)
        if (shape[0], dtype, setting["offset"]) != (2, "float32", 100.0)
    ]
    return [
        Spec(shape=shape, dtype=dtype, seed=seed, **setting)
        for seed, (shape, dtype, setting) in enumerate(cases)
    ]


def batch_norm_arrays(spec: Spec) -> dict[str, np.ndarray]:
    """Returns the inputs and outputs of one layer, trained on STEPS batches.

    `x` holds one batch a step. Outputs and gradients in training are those of
    the first step, those in evaluation are of the first batch after the last.
    """
    rng = np.random.default_rng(spec.seed)
    features = spec.shape[1]
    draw = {
        "x": spec.offset + rng.normal(size=(STEPS, *spec.shape)),
        "dy": rng.normal(size=spec.shape),
        "running_mean": rng.normal(size=features),
        "running_var": rng.uniform(0.5, 2.0, size=features),
        "weight": rng.uniform(0.5, 2.0, size=features),
        "bias": rng.normal(size=features),
    }
    arrays = {name: value.astype(spec.dtype) for name, value in draw.items()}
    if not spec.affine:
        del arrays["weight"], arrays["bias"]

    kinds = {
        2: torch.nn.BatchNorm1d,
        4: torch.nn.BatchNorm2d,
        5: torch.nn.BatchNorm3d,
    }
    layer = kinds[len(spec.shape)](
        features, eps=spec.eps, momentum=spec.momentum, affine=spec.affine
    ).to(getattr(torch, spec.dtype))
    state = ["running_mean", "running_var"]
    state += ["weight", "bias"] if spec.affine else []
    layer.load_state_dict(
        {name: torch.tensor(arrays[name]) for name in state}, strict=False
    )

    def run(step: int, suffix: str) -> None:
        x = torch.tensor(arrays["x"][step], requires_grad=True)
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.tensor(arrays["dy"]))
        arrays["y" + suffix] = y.detach().numpy()
        arrays["dx" + suffix] = x.grad.numpy()
        if spec.affine:
            arrays["dweight" + suffix] = layer.weight.grad.numpy().copy()
            arrays["dbias" + suffix] = layer.bias.grad.numpy().copy()

    def keep_stats(suffix: str) -> None:
        arrays["running_mean" + suffix] = layer.running_mean.numpy().copy()
        arrays["running_var" + suffix] = layer.running_var.numpy().copy()

    run(0, "_train")
    keep_stats("_after_1")
    for batch in arrays["x"][1:]:
        layer(torch.tensor(batch))
    keep_stats(f"_after_{STEPS}")
    arrays["num_batches_tracked"] = layer.num_batches_tracked.numpy()
    layer.eval()
    run(0, "_eval")
    return arrays


def network_arrays() -> dict[str, np.ndarray]:
    """Returns the states of a small network before and after each step of SGD.

    Linear(6, 8), BatchNorm1d(8), ReLU, Linear(8, 3), squared error, float64;
    state arrays have a leading axis of NETWORK_STEPS + 1.
    """
    rng = np.random.default_rng(NETWORK_SEED)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))
    inputs = rng.normal(size=(NETWORK_STEPS, 16, 6))
    targets = rng.normal(size=(NETWORK_STEPS, 16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=NETWORK_LEARNING_RATE)

    def state() -> dict[str, np.ndarray]:
        return {
            name: value.numpy().copy() for name, value in model.state_dict().items()
        }

    states = [state()]
    losses = []
    for x, target in zip(inputs, targets, strict=True):
        loss = torch.nn.functional.mse_loss(
            model(torch.tensor(x)), torch.tensor(target)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        states.append(state())
    stacked = {name: np.stack([s[name] for s in states]) for name in states[0]}
    return {"x": inputs, "target": targets, "loss": np.array(losses), **stacked}


def main() -> None:
    """Writes the file."""
    arrays = {
        f"{spec.name}/{name}": value
        for spec in specs()
        for name, value in batch_norm_arrays(spec).items()
    }
    arrays |= {f"network/{name}": value for name, value in network_arrays().items()}
    metadata = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "steps": STEPS,
        "cases": {spec.name: dataclasses.asdict(spec) for spec in specs()},
        "network": {
            "seed": NETWORK_SEED,
            "steps": NETWORK_STEPS,
            "learning_rate": NETWORK_LEARNING_RATE,
            "momentum": 0.1,
            "eps": 1e-5,
        },
    }
    np.savez_compressed(PATH, metadata=np.array(json.dumps(metadata)), **arrays)


if __name__ == "__main__":
    main()
