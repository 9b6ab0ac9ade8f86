"""What the BN layers of a checkpoint hold."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.commands.table import format_table
from bnjax.data.config import SettingError
from bnjax.interop.torch import natural
from bnjax.training.evaluation import load_run


@dataclasses.dataclass(frozen=True)
class Range:
    """The smallest and the largest of some values."""

    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.min:.3g} to {self.max:.3g}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one BN layer holds.

    Args:
        path: of its variables, such as "bn_0".
        features: how many units it normalizes.
        scale: None where it has none.
        bias: None where it has none.
        mean: running.
        var: running.
        scale_near_zero: units whose |scale| is below the threshold.
        var_near_zero: units whose var is below the threshold.
        dead: units that are one or the other.
    """

    path: str
    features: int
    scale: Range | None
    bias: Range | None
    mean: Range
    var: Range
    scale_near_zero: int
    var_near_zero: int
    dead: int


def find_layers(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    scale_below: float = 1e-3,
    var_below: float = 1e-5,
) -> list[Layer]:
    """Describe every layer that has a running mean and variance.

    Args:
        params: of a network; "scale" and "bias" lie where the statistics do.
        batch_stats: of the network, with the leaves "mean" and "var".
        scale_below: a unit is dead where |scale| is below it, at every position where
            the scale has several.
        var_below: a unit is dead where the running variance is below it.

    Returns:
        The layers by their paths, numbers in their order.

    Example:
        >>> params = {"bn": {"scale": np.array([1.0, 0.0, 2.0])}}
        >>> stats = {"bn": {"mean": np.zeros(3), "var": np.array([4.0, 1.0, 0.0])}}
        >>> [layer] = find_layers(params, stats)
        >>> layer.path, layer.features, layer.dead, str(layer.var)
        ('bn', 3, 2, '0 to 4')
    """
    statistics = {k: np.asarray(v) for k, v in flatten_dict(batch_stats).items()}
    parameters = {k: np.asarray(v) for k, v in flatten_dict(params).items()}
    found = [
        path[:-1]
        for path in statistics
        if path[-1] == "mean" and (*path[:-1], "var") in statistics
    ]
    layers = []
    for path in sorted(found, key=lambda path: natural("/".join(path))):
        mean, var = (statistics[(*path, name)] for name in ("mean", "var"))
        scale, bias = (parameters.get((*path, name)) for name in ("scale", "bias"))
        flat = var < var_below
        silent = np.zeros_like(flat)
        if scale is not None:
            silent = np.abs(scale).reshape(-1, *var.shape).max(0) < scale_below
        layers.append(
            Layer(
                path="/".join(path) or "(top level)",
                features=mean.size,
                scale=None if scale is None else _range(scale),
                bias=None if bias is None else _range(bias),
                mean=_range(mean),
                var=_range(var),
                scale_near_zero=int(silent.sum()),
                var_near_zero=int(flat.sum()),
                dead=int((silent | flat).sum()),
            )
        )
    return layers


def inspect_run(
    workdir: Path,
    *,
    as_json: bool = False,
    scale_below: float = 1e-3,
    var_below: float | None = None,
    data_dir: Path | None = None,
) -> None:
    """Print what the BN layers of a run's newest checkpoint hold.

    Args:
        workdir: the folder that train.py wrote.
        as_json: print JSON in place of the table.
        scale_below: see `find_layers`.
        var_below: see `find_layers`; the run's epsilon if None.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        RunError: the folder is no run, or something in it is damaged.
    """
    for flag, value in (("scale", scale_below), ("var", var_below)):
        if value is not None and not value >= 0:
            raise SettingError(f"--{flag}-below {value}: expected 0 or more.")
    run = load_run(workdir, data_dir)
    _, state = run.restore()
    var_below = run.config.bn.epsilon if var_below is None else var_below
    layers = find_layers(
        state.params, state.batch_stats, scale_below=scale_below, var_below=var_below
    )
    if as_json:
        described = {
            "workdir": str(workdir),
            "step": int(state.step),
            "scale_below": scale_below,
            "var_below": var_below,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
        print(json.dumps(described, indent=2))
        return
    title = f"{workdir}, step {int(state.step):,}"
    if not layers:
        print(f"{title}: no layer has a running mean and variance.")
        return
    print(f"{title}: {len(layers)} BN layer{'s' if len(layers) > 1 else ''}")
    header = ("layer", "features", "scale", "bias", "mean", "var", "dead")
    rows = [
        (
            layer.path,
            f"{layer.features:,}",
            *(str(getattr(layer, name) or "-") for name in header[2:6]),
            f"{layer.dead:,}",
        )
        for layer in layers
    ]
    print(format_table(header, rows))
    dead = sum(layer.dead for layer in layers)
    units = sum(layer.features for layer in layers)
    print(
        f"{dead:,} of {units:,} units are dead: |scale| below {scale_below:g} or var "
        f"below {var_below:g}."
    )


def _range(values: np.ndarray) -> Range:
    return Range(float(values.min()), float(values.max()))
