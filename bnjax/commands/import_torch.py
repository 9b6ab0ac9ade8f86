"""Weights of PyTorch as the folder of a run, which eval.py reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnjax.commands.new_run import check_new_run, write_run
from bnjax.data.config import DataError, SettingError
from bnjax.data.sources import Source, open_data
from bnjax.interop.torch import (
    LayerMapping,
    TorchError,
    classes_in,
    from_torch,
    known_mapping,
)
from bnjax.interop.torch_files import format_mapping, read_mapping, read_state_dict
from bnjax.interop.torch_proposal import alike, propose_mapping, trace
from bnjax.training.config import Config
from bnjax.training.presets import parse
from bnjax.training.program import Program
from bnjax.training.transfer import describe_data, described_source


def import_torch(
    file: Path,
    output: Path,
    *,
    preset: str,
    flags: Sequence[str] = (),
    mapping: Path | None = None,
    names: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    confirm: bool = False,
    image_shape: Sequence[int] | None = None,
    force: bool = False,
) -> None:
    """Write a run whose network has the weights and statistics of a state dict.

    Where the data set is not there, the number of classes is that of the weights, and
    the size of images `image_shape` or --data.image-size.

    Args:
        file: .safetensors, or what `torch.save(model.state_dict(), file)` wrote.
        output: the folder to write.
        preset: of train.py; it says which network, and on which data.
        flags: of train.py, which change the preset.
        mapping: a file that `bnjax.interop.torch_files.read_mapping` reads; None: that
            of the network.
        names: THEIRS=OURS each: patterns that come before the mapping's.
        ignore: layers or tensors of PyTorch that go nowhere.
        keep: layers or arrays of ours that keep their first values.
        confirm: where no mapping is known, take the one proposed.
        image_shape: of one example; the data set is then not looked for.
        force: replace a run that is in `output`.

    Raises:
        SettingError: the folder cannot be written, or a flag is wrong.
        TorchError: the file cannot be read, its tensors do not fit the network, or no
            mapping is known; then one is proposed.
        DataError: the data set is not there, and the weights do not tell enough.
    """
    told: dict[str, Any] = {**dict(map(_pair, names)), **dict.fromkeys(ignore)}
    check_new_run(output, force=force)
    preset, config = parse([preset, *flags])
    state = read_state_dict(file)
    given = None if mapping is None else read_mapping(mapping)
    source = _open_source(config, state, {**told, **(given or {})}, image_shape)
    program = Program(config, source)
    initial = program.initial_state()
    variables = {"params": initial.params, "batch_stats": initial.batch_stats}
    layers = given or known_mapping(config.model.name, source.image_shape)
    if layers is None:
        called = trace(program.model, program.images, train=False)
        layers = propose_mapping(state, variables, called, told)
        if not confirm:
            raise _unconfirmed(file, config, layers, variables)
    imported = from_torch(state, variables, {**told, **layers, **told}, keep=keep)
    write_run(
        output,
        preset,
        dataclasses.replace(config, workdir=output),
        dataclasses.replace(initial, **imported),
        {
            "command": "import-torch",
            "file": str(file),
            "data": describe_data(source),
        },
        force=force,
    )
    print(
        f"{file}: {len(state)} tensors of {config.model.name}\n"
        f"{output} holds the network as of step 0: python eval.py {output}"
    )


def _open_source(
    config: Config,
    state: Mapping[str, Any],
    mapping: LayerMapping,
    image_shape: Sequence[int] | None,
) -> Source:
    """Return the data set, without examples where it is not there."""
    if image_shape is not None:
        if len(image_shape) not in (2, 3) or min(image_shape) < 1:
            raise SettingError(
                f"--image-shape {' '.join(map(str, image_shape))}: expected a height, "
                "a width and the channels, such as 224 224 3."
            )
        shape, absent = tuple(image_shape), None
    else:
        try:
            return open_data(config.data, config.data_dir)
        except DataError as error:
            absent = error
        if (size := config.data.image_size) is None:
            raise DataError(
                f"{absent}\nOr say which images the network takes, and the weights "
                "tell the rest: --image-shape HEIGHT WIDTH CHANNELS."
            ) from absent
        shape = (size, size, 3)
    known = known_mapping(config.model.name, shape) or {}
    classes = classes_in(state, {**mapping, **known, **mapping})
    if classes is None:
        raise absent or SettingError(
            "--image-shape: no tensor goes to the layer logits, and the number of "
            "classes is not known. Prepare the data set, and leave the flag out."
        )
    return described_source(config.data, {"image_shape": shape, "classes": classes})


def _unconfirmed(
    file: Path, config: Config, proposed: LayerMapping, variables: Mapping[str, Any]
) -> TorchError:
    by_order = ", ".join(alike(proposed, variables)) or "none"
    return TorchError(
        f"{file} was not imported: no mapping is known for {config.model.name}. By the "
        f"shapes of its arrays it could be:\n{format_mapping(proposed)}\n"
        f"By order alone, since others have the same shapes: {by_order}. If all of it "
        "is right, add --confirm; else write it to a file, put it right, and give "
        "--mapping FILE."
    )


def _pair(text: str) -> tuple[str, str]:
    theirs, _, ours = text.partition("=")
    if not theirs or not ours:
        raise SettingError(
            f"--names {text}: expected THEIRS=OURS, a layer of PyTorch and the path of "
            "ours, such as linear=logits.",
        )
    return theirs, ours
