"""What a run is told: typed, frozen, documented.

tyro reads these classes for the command line; the sentence under each field is what
`--help` shows. `bnjax.training.validation` refuses what no run can use.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bnjax.data.config import DataConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. An option of None has the model's own default."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "mlp"
    """mlp, lenet, inception, resnet20, resnet56, resnet110 or resnet50.
    my_package.nets:make_net: a function of your own."""
    hidden: tuple[int, ...] | None = None
    """Of mlp: width of each hidden layer."""
    weight_std: float | None = None
    """Of mlp: standard deviation of the Gaussian the weights start from."""
    weight_scale: float | None = None
    """Of the others: factor on the standard deviation of the first weights."""
    activation: str | None = None
    """The nonlinearity, a name of jax.nn such as "relu" or "sigmoid"."""
    dropout: float | None = None
    """Of inception and resnet: rate of dropout before the classifier."""
    pool: Literal["avg", "max"] | None = None
    """Of lenet: how it pools."""
    width: float | None = None
    """Of inception and resnet: factor on the number of filters of each layer."""
    stem: Literal["imagenet", "small"] | None = None
    """Of inception: its first layers, for images of 224x224, or for 32x32."""
    separable_conv1: bool | None = None
    """Of inception: conv1 separable, with depth multiplier 8 (the paper's appendix)."""
    printed_depths: bool | None = None
    """Of inception: depths as the paper prints them, not as its filters sum up."""
    local_response_norm: bool | None = None
    """Of inception: normalize the local response after pool1 and after conv2."""
    per_activation: bool | None = None
    """Of inception: BN of the last modules scales and shifts each position apart."""
    zero_scale: bool | None = None
    """Of resnet: the scale of each block's last BN starts at 0, not at 1."""


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    """Batch normalization."""

    momentum: float = 0.99
    """Weight of the OLD running value, as in Flax (PyTorch's 0.1 is 0.9 here)."""
    epsilon: float = 1e-5
    """Added to the variance."""
    unbiased: bool = True
    """Running variance with Algorithm 2's m/(m-1), as PyTorch; Flax: without."""
    implementation: Literal["bnjax", "flax"] = "bnjax"
    """Whose layer: bnjax.linen.BatchNorm, or to compare, flax.linen.BatchNorm."""
    sync: str = "global"
    """Whose examples are normalized together.
    global: those of all devices.
    group:K: those of K neighbouring devices.
    per-device: those of each device by itself."""
    virtual_batch_size: int | None = None
    """Normalize so many examples at a time, in training (the paper's replicas: 32).
    None: all that --bn.sync puts together."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    name: Literal[
        "sgd",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam",
        "adamw",
        "lamb",
        "lars",
    ] = "sgd"
    """The rule: plain SGD, SGD with (Nesterov's) momentum, or one of Optax's others."""
    momentum: float = 0.9
    """Of momentum, nesterov and lars: the weight of the old direction."""
    beta1: float = 0.9
    """Of adam, adamw and lamb: the weight of the old mean of gradients."""
    beta2: float = 0.999
    """Of adam, adamw and lamb: the weight of the old mean of squared gradients."""
    rms_decay: float = 0.9
    """Of rmsprop: the weight of the old mean of squared gradients."""
    epsilon: float = 1e-8
    """Of adagrad, rmsprop, adam, adamw and lamb: added to the denominator."""
    weight_decay: float = 0.0
    """L2 penalty on weights, never on biases or BN's scale.
    Its gradient is added to the loss's; in adamw and lamb, to the step."""
    clip_norm: float | None = None
    """Gradients of a larger global norm are scaled down to this. None: as they are."""
    schedule: Literal["constant", "exponential", "cosine", "step", "linear"] = (
        "constant"
    )
    """What the learning rate does after the warm-up.
    constant: stays as it is.
    exponential: times decay-rate every decay-steps.
    cosine: half a cosine, down to 0 at the last step.
    step: times decay-rate at each of --optim.boundaries.
    linear: a line, down to 0 at the last step."""
    decay_rate: float = 0.96
    """Of exponential and step: the factor."""
    decay_steps: int = 1000
    """Of exponential: how many steps apart."""
    staircase: bool = True
    """Of exponential: all of a decay at once; else a little of it every step."""
    boundaries: tuple[int, ...] = ()
    """Of step: the steps at which the rate drops, such as 30000 60000."""
    warmup_steps: int = 0
    """Steps over which the rate first rises on a line to --learning-rate.
    The schedule starts after them."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Several hosts that train together: the same command on each but for the index."""

    coordinator: str | None = None
    """ADDRESS:PORT of host 0, free there and reached by all. None: one host.
    auto: found by JAX, under Slurm, Open MPI and on Cloud TPU."""
    count: int = 1
    """How many hosts there are."""
    index: int = 0
    """Which of them this is, counted from 0; host 0 writes the run's folder."""
    timeout: int = 120
    """Seconds to wait for the others to come."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run is a function of this and of the machine it runs on."""

    steps: int
    """How many steps to train."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Learning rate that the schedule starts from."""
    seed: int = 0
    """Of all randomness: first weights, order of the data, augmentation."""
    batch_norm: bool = True
    """Normalize each hidden layer; without, its bias returns."""
    ema: float | None = None
    """Evaluate a moving average of the parameters; this is the old average's weight.
    None: evaluate the parameters themselves."""
    batch_stats_from: int = 100
    """Of --ema: over how many training batches the average's statistics are taken."""
    init_from: Path | None = None
    """Start from another network: the folder of a run, or weights saved by PyTorch.
    Its last layer starts anew where the classes are others."""
    init_stats: Literal["adapt", "freeze", "reset"] = "adapt"
    """What becomes of the running statistics of --init-from.
    adapt: they move on from where they are.
    freeze: they stay, and normalize in training too.
    reset: they start anew."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, each normalized by itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, statistics and losses stay in float32."""
    parallel: Literal["auto", "single", "pmap", "spmd"] = "auto"
    """How devices share the work.
    pmap: each has a part of the batch.
    spmd: one program, its arrays sharded.
    single: one device works.
    auto: pmap where there are several, else single.
    A network of your own that takes no normalization: spmd in place of pmap."""
    devices: int | None = None
    """How many devices to use, the first ones. None: all."""
    workdir: Path | None = None
    """Where the run writes, a folder without a run. None: runs/<preset>-<time>."""
    resume: bool = False
    """Continue the run in --workdir bit for bit; without a checkpoint, start it."""
    data_dir: Path | None = None
    """Where tfds sets are. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    log_every: int = 100
    """Steps that metrics.jsonl has the mean of, in one dispatch to the device.
    Convolutions on a CPU are dispatched step by step: in a loop they are slow."""
    eval_every: int = 500
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best by test accuracy stays too."""
    eval_batch_size: int = 1000
    """Examples in a batch of the evaluation; results stay the same."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do where the loss is nan or infinite.
    stop: end the run, and name the layer that it began in.
    skip: drop the step, where anything in it is not finite, and go on."""
    tensorboard: bool = False
    """Write what metrics.jsonl has to <workdir>/tensorboard too, for TensorBoard."""
    histograms: bool = False
    """For TensorBoard: scale, bias, mean and var of BN layers, when evaluating."""
    profile: bool = False
    """Trace the second dispatch with jax.profiler, to <workdir>/profile."""
    compilation_cache: Path | None = None
    """A folder where compiled programs are kept for the next run. None: not kept."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimizerConfig = OptimizerConfig()
    bn: BatchNormConfig = BatchNormConfig()
    hosts: HostsConfig = HostsConfig()


INCIDENTAL = frozenset(
    {
        "parallel",
        "devices",
        "hosts",
        "workdir",
        "resume",
        "on_nan",
        "data_dir",
        "keep",
        "tensorboard",
        "histograms",
        "profile",
        "compilation_cache",
    }
)
"""Fields of `Config` that no result depends on: a resumed run may change them."""
