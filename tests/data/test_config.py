import dataclasses

import pytest

from bnjax.cli import parse_train
from bnjax.data.config import AugmentConfig, DataConfig, SettingError, validate_data
from bnjax.training.config import Config, differences, from_json, to_json


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.workers", "-1"], "--data.workers -1: expected 0 or more."),
        (["--data.prefetch", "0"], "--data.prefetch 0: expected 1 or more."),
        (["--data.shard-size", "0"], "--data.shard-size 0: expected 1 or more."),
        (["--data.image-size", "0"], "--data.image-size 0: expected 1 or more."),
        (["--data.central-crop", "1.5"], "--data.central-crop 1.5: expected a number"),
        (["--data.std", "0"], "--data.std 0.0: expected a positive number"),
        (["--data.mean", "nan"], "--data.mean nan: expected a number"),
        (
            ["--data.augment.area", "0.5", "0.2"],
            "--data.augment.area 0.5 0.2: expected two rising numbers in (0, 1].",
        ),
        (["--data.augment.aspect", "0", "1"], "--data.augment.aspect 0.0 1.0: exp"),
        (["--data.augment.strength", "2"], "--data.augment.strength 2.0: expected"),
        (["--data.augment.padding", "-1"], "--data.augment.padding -1: expected 0"),
    ],
)
def test_values_no_run_can_use(flags, message):
    with pytest.raises(SettingError) as caught:
        parse_train(flags)
    assert message in str(caught.value)


def test_the_defaults_pass():
    validate_data(DataConfig())
    validate_data(DataConfig(augment=AugmentConfig(kind="crop")))


def test_a_record_reads_back():
    data = DataConfig(mean=(0.1, 0.2, 0.3), image_size=24, shuffle="within-shard")
    data = dataclasses.replace(data, augment=AugmentConfig(area=(0.2, 1.0)))
    config = Config(steps=1, batch_size=2, learning_rate=0.1, data=data)
    assert from_json(to_json(config), "config.json") == config


def test_a_resumed_run_may_have_other_workers():
    def configure(**data):
        return Config(steps=1, batch_size=2, learning_rate=0.1, data=DataConfig(**data))

    assert differences(configure(), configure(workers=3, prefetch=9)) == []
    assert (
        "--data.shuffle"
        in differences(configure(), configure(shuffle="fixed-batches"))[0]
    )
