"""Compile one program ahead of time for a TPU or a GPU that this machine lacks.

    python -m benchmarks.aot '{"target": "v5e", "network": "chain", ...}'

`benchmarks.compiled` runs this command for each of its programs, in a separate process
with the environment of the target, and reads the figures that it prints.

A program is the training pass of one layer with a ReLU: from x and a given gradient of
y, it computes y, the gradients and the new statistics. Or a program computes the
gradients of a network's loss with respect to its parameters, and the new statistics.
Images and activations have the dtype of the program; parameters and statistics are
float32.
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bnjax
from benchmarks import hlo
from benchmarks.networks import Blocks, Stack, loss_of
from benchmarks.passes import temporary_bytes
from benchmarks.peers import NORM_KINDS, PeerNorm
from bnjax import models

AXIS = "batch"
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)
SHARING = ("axis_name", "arrays")
"""How chips share statistics: in shard_map, and in jit with arrays that are sharded."""
DEVICES = Path(__file__).parent / "devices"


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Args:
        platform: "tpu" or "cuda".
        topologies: by a number of chips, the name of a topology that has them.
        packages: of the compiler, as pip calls them.
        chain: how many layers the chain has: fewer where compiling takes long.
    """

    platform: str
    topologies: dict[int, str]
    packages: tuple[str, ...] = ("libtpu",)
    chain: int = 3

    @property
    def environment(self) -> dict[str, str]:
        """What must be set before JAX is imported."""
        found = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if self.platform == "cuda":
            # There is no device to try kernels on.
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
            return found | {"XLA_FLAGS": flags.strip()}
        # Else libtpu asks the cloud what machine this is.
        return found | {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }


TARGETS = {
    "v5e": Target("tpu", {4: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}),
    "v6e": Target("tpu", {4: "v6e:2x2", 16: "v6e:4x4", 256: "v6e:16x16"}),
    "v5p": Target("tpu", {4: "v5p:2x2x1", 16: "v5p:4x2x2", 256: "v5p:8x8x4"}),
    "h200": Target(
        "cuda",
        {1: "1x1x1", 8: "1x1x8"},
        ("jax-cuda12-plugin", "jax-cuda12-pjrt"),
        chain=12,
    ),
}


class Alone(nn.Module):
    """One layer of batch normalization and a ReLU.

    Args:
        normalization: called as `bnjax.models.Normalization` is.
        dtype: of the output.
    """

    normalization: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return an array of the shape of `x`."""
        return self.normalization(
            x, train=train, activation="relu", name="bn", dtype=self.dtype
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and the batch that one chip is given.

    Args:
        create: from the number of layers, the normalization and the dtype.
        batch: examples.
        shape: of an example.
        classes: of the labels; None for a network without.
    """

    create: Callable[[int, PeerNorm, Any], nn.Module]
    batch: int
    shape: tuple[int, ...]
    classes: int | None = None


def _model(name: str) -> Callable[[int, PeerNorm, Any], nn.Module]:
    def create(layers: int, normalization: PeerNorm, dtype: Any) -> nn.Module:
        del layers
        return models.create(name, normalization=normalization, dtype=dtype)

    return create


NETWORKS = {
    "layer": Network(lambda _, norm, dtype: Alone(norm, dtype), 128, (56, 56, 256)),
    "chain": Network(
        lambda layers, norm, dtype: Stack(layers, 128, norm, dtype=dtype),
        128,
        (28, 28, 128),
    ),
    "block": Network(
        lambda layers, norm, dtype: Blocks(layers, 64, norm, dtype),
        128,
        (56, 56, 256),
    ),
    "resnet50": Network(_model("resnet50"), 128, (224, 224, 3), 1000),
    "inception": Network(_model("inception"), 32, (224, 224, 3), 1000),
    "mlp": Network(_model("mlp"), 60, (28, 28, 1), 10),
}


def save_inputs(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep what convolutions, products and sums return: a remat policy for Flax.

    Its BN has no names to save by.
    """
    return primitive.name in ("conv_general_dilated", "dot_general", "reduce_sum")


POLICIES = {"flax_policy": "flax", "bnjax_policy": "bnjax_inside"}
"""Kinds that compute activations again in the backward pass, and of which layer."""
KINDS = (*NORM_KINDS, *POLICIES)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled.

    Args:
        target: of `TARGETS`.
        network: of `NETWORKS`.
        dtype: of images and activations.
        kind: of `KINDS`.
        layers: of the chain, or blocks.
        batch: examples of each chip.
        chips: that divide the batch.
        sharing: of `SHARING`; None on one chip.
        backward: else the forward pass in training alone: y and the new statistics.
    """

    target: str
    network: str
    dtype: str
    kind: str
    layers: int
    batch: int
    chips: int = 1
    sharing: str | None = None
    backward: bool = True

    @property
    def name(self) -> str:
        """In a few words."""
        words = [self.target, self.network, self.dtype, self.kind]
        if self.sharing is not None:
            words += [self.sharing, str(self.chips)]
        return " ".join(words if self.backward else [*words, "forward"])

    def model(self, kind: str | None = None) -> nn.Module:
        """Build the network, with a layer of another kind where one is given."""
        kind = kind or POLICIES.get(self.kind, self.kind)
        axis_name = AXIS if self.sharing == "axis_name" else None
        norm = PeerNorm(kind, axis_name)
        return NETWORKS[self.network].create(self.layers, norm, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Function:
    """A program's function, and how what it takes and gives is divided.

    Args:
        apply: the function.
        arguments: shapes and dtypes, of all chips together.
        given: PartitionSpec of each argument.
        returned: PartitionSpec of each output.
    """

    apply: Callable[..., Any]
    arguments: tuple[Any, ...]
    given: tuple[PartitionSpec, ...]
    returned: tuple[PartitionSpec, ...]


def function_of(program: Program) -> Function:
    """Return what a program computes."""
    network, model = NETWORKS[program.network], program.model()
    examples = program.chips * program.batch
    x = jax.ShapeDtypeStruct((examples, *network.shape), jnp.dtype(program.dtype))
    params, stats = variables(model, x)

    def forward(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, updates = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return y, updates.get("batch_stats", {})

    def layer(params: Any, stats: Any, x: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        y, pull, new = jax.vjp(
            lambda params, x: forward(params, stats, x), params, x, has_aux=True
        )
        # As in a network: the gradient is there when the output is.
        y, dy = lax.optimization_barrier((y, dy))
        dparams, dx = pull(dy)
        return y, dx, dparams, new

    arguments, given = (params, stats, x), (WHOLE, WHOLE, SPLIT)
    if not program.backward:
        return Function(forward, arguments, given, (SPLIT, WHOLE))
    if program.network == "layer":
        returned = (SPLIT, SPLIT, WHOLE, WHOLE)
        return Function(layer, (*arguments, x), (*given, SPLIT), returned)
    loss = loss_of(model)
    if program.kind == "flax_policy":
        loss = jax.checkpoint(loss, policy=save_inputs)
    if program.kind == "bnjax_policy":
        loss = jax.checkpoint(loss, policy=vars(bnjax)["checkpoint_policy"])
    labels = None
    if network.classes is not None:
        labels = jax.ShapeDtypeStruct((examples,), jnp.int32)
    return Function(
        jax.grad(loss, has_aux=True),
        (*arguments, labels),
        (*given, SPLIT),
        (WHOLE, WHOLE),
    )


def variables(model: nn.Module, x: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """Return the shapes of params and batch_stats; the latter empty without BN."""
    one = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
    found = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), one)
    return found.get("params", {}), found.get("batch_stats", {})


def mesh_of(program: Program) -> Mesh:
    """Return the chips of a program, which are not here."""
    target = TARGETS[program.target]
    name = target.topologies[
        min(chips for chips in target.topologies if chips >= program.chips)
    ]
    options: dict[str, Any] = {"topology_name": name}
    if target.platform == "cuda":
        description = (DEVICES / f"{program.target}.txtpb").read_text("utf-8")
        options = {"topology": name, "target_config": description}
    found = topologies.get_topology_desc(platform=target.platform, **options).devices
    return Mesh(np.array(found[: program.chips]), (AXIS,))


def lowered(program: Program) -> jax.stages.Lowered:
    """Trace a program and hand it to the compiler of its target."""
    function, mesh = function_of(program), mesh_of(program)
    apply = function.apply
    if program.sharing == "axis_name":
        apply = jax.shard_map(
            apply, mesh=mesh, in_specs=function.given, out_specs=function.returned
        )
    placed = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
    program_of = jax.jit(
        apply,
        in_shardings=placed(function.given),
        out_shardings=placed(function.returned),
    )
    return program_of.lower(*function.arguments)


def digest_of(lowered: jax.stages.Lowered, target: str) -> str:
    """Return a digest of all that the figures depend on, but for versions."""
    found = hashlib.sha256(lowered.as_text().encode())
    found.update(Path(hlo.__file__).read_bytes())
    if TARGETS[target].platform == "cuda":
        found.update((DEVICES / f"{target}.txtpb").read_bytes())
    return found.hexdigest()[:16]


def measured(
    program: Program, known: str | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Compile a program and return its figures.

    Args:
        program: to compile, in the environment of its target.
        known: a digest; a program that has it is not compiled.
        folder: where to keep the text of what was compiled.

    Returns:
        The figures of `hlo.figures`, and the digest; that alone where it is known.
    """
    start = time.perf_counter()
    found = lowered(program)
    digest = digest_of(found, program.target)
    if digest == known:
        return {"digest": digest}
    traced = time.perf_counter()
    compiled = found.compile()
    seconds = time.perf_counter() - traced
    text = compiled.as_text() or ""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{program.name.replace(' ', '-')}.txt").write_text(text, "utf-8")
    network = NETWORKS[program.network]
    x = jax.ShapeDtypeStruct((program.batch, *network.shape), jnp.dtype(program.dtype))
    _, stats = variables(program.model("flax"), x)
    return {
        "digest": digest,
        "normalizations": len(jax.tree.leaves(stats)) // 2,
        "array_bytes": x.size * x.dtype.itemsize,
        **hlo.figures(text, x.size * x.dtype.itemsize),
        "temporary_bytes": temporary_bytes(compiled),
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(seconds, 1),
    }


def main(
    program: str, known: str | None = None, hlo_folder: Path | None = None
) -> None:
    """Compile a program and print its figures as JSON.

    Args:
        program: The fields of a `Program`, as JSON.
        known: Stop where that is the program's digest.
        hlo_folder: Where to keep the text of what was compiled.
    """
    row = measured(Program(**json.loads(program)), known, hlo_folder)
    print(json.dumps(row))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
