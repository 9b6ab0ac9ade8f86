"""A small prepared tfds data set, written without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

SIZES = {"train": 40, "test": 13}


def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split: each example another."""
    rng = np.random.default_rng(len(split))
    images = rng.integers(0, 256, (SIZES[split], 6, 5, 1), np.uint8)
    return images, np.arange(SIZES[split]) % 3


def write(root: Path, name: str = "tiny", version: str = "1.2.0") -> Path:
    """Write the set below `root` as tfds would and return its folder."""
    folder = root / name / version
    folder.mkdir(parents=True)
    for split in SIZES:
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for image, label in zip(*arrays(split), strict=True):
            writer.write(_example(image, int(label)))
        writer.close()
    features = {
        "image": {
            "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
            "image": {
                "shape": {"dimensions": ["6", "5", "1"]},
                "dtype": "uint8",
                "encodingFormat": "png",
            },
        },
        "label": {
            "pythonClassName": (
                "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
            ),
            "classLabel": {"numClasses": "3"},
        },
    }
    described = {
        "pythonClassName": (
            "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        ),
        "featuresDict": {"features": features},
    }
    info = {
        "name": name,
        "version": version,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "shardLengths": [str(size)],
                "numBytes": "1",
            }
            for split, size in SIZES.items()
        ],
    }
    (folder / "features.json").write_text(json.dumps(described))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _example(image: np.ndarray, label: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(image[..., 0]).save(png, "PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(png.getvalue())
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()
