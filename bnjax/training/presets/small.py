"""Presets for the embedded digits, MNIST and Fashion-MNIST."""

from bnjax.training.config import Config, Preset, vary

LENET = vary(
    Config(steps=2340, batch_size=256, learning_rate=1.0),
    log_every=117,
    eval_every=234,  # The whole batches of an epoch.
    checkpoint_every=1170,
    model={"name": "lenet", "pool": "avg", "activation": "sigmoid"},
    data={"name": "fashion_mnist"},
    bn={"momentum": 0.9},
)

PRESETS = (
    Preset(
        name="digits",
        summary="The paper's network on scikit-learn's 1,797 digits of 8x8.",
        expectation="No network connection is needed. Test accuracy about 98 %.",
        time="About 10 seconds on two CPU cores.",
        config=vary(
            Config(steps=2000, batch_size=60, learning_rate=0.1),
            eval_every=100,
            checkpoint_every=1000,
            optim={"schedule": "cosine_decay_schedule"},
            # With this momentum, short runs have useful running statistics at the end.
            bn={"momentum": 0.9},
        ),
    ),
    Preset(
        name="mnist",
        summary="Section 4.1 of the paper: binary MNIST, 50,000 steps of 60.",
        expectation=(
            "Plain SGD. Test accuracy about 97.6 % (about 96.3 % with --no-batch-norm)."
        ),
        time=(
            "About half a minute on two CPU cores, and up to another half to decode "
            "the images the first time."
        ),
        config=vary(
            Config(steps=50_000, batch_size=60, learning_rate=0.5),
            log_every=250,
            model={"hidden": (100, 100, 100), "weight_std": 0.01},
            data={"name": "mnist", "binarize": True},
        ),
    ),
    Preset(
        name="lenet",
        summary="LeNet with sigmoids on Fashion-MNIST, 10 epochs at learning rate 1.",
        expectation=(
            "The example of Dive into Deep Learning, which reports a test accuracy of "
            "86.9 % with its framework's layer and 80.1 % with its own; this project "
            "ran only lenet-mnist."
        ),
        config=LENET,
    ),
    Preset(
        name="lenet-mnist",
        summary="The same network and settings on MNIST.",
        expectation="Test accuracy about 98.6 %, 96.9 % without normalization.",
        time="2 minutes on a CPU core.",
        config=vary(LENET, data={"name": "mnist"}),
    ),
)
