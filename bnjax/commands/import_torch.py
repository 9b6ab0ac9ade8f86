"""Weights of PyTorch as the folder of a run, which eval.py reads."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from bnjax.commands.new_run import check_new_run, write_run
from bnjax.data.config import SettingError
from bnjax.data.sources import open_data
from bnjax.interop.torch import from_torch, match, read_state_dict, trace
from bnjax.training.presets import parse
from bnjax.training.program import Program


def import_torch(
    file: Path,
    output: Path,
    *,
    preset: str,
    flags: Sequence[str] = (),
    names: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Write a run whose network has the weights and statistics of a state dict.

    Args:
        file: .safetensors, or what `torch.save(model.state_dict(), file)` wrote.
        output: the folder to write.
        preset: of train.py; it says which network, and on which data.
        flags: of train.py, which change the preset.
        names: THEIRS=OURS each: layers or blocks that are to be matched.
        ignore: layers or blocks of PyTorch that go nowhere.
        keep: layers or arrays of ours that keep their first values.
        force: replace a run that is in `output`.

    Raises:
        RunError: the file cannot be read, its tensors do not fit the network, or the
            folder cannot be written.
    """
    given = dict(_pair(each) for each in names)
    check_new_run(output, force=force)
    preset, config = parse([preset, *flags])
    state = read_state_dict(file)
    source = open_data(config.data, config.data_dir)
    program = Program(config, source)
    initial = program.initial_state()
    variables = {"params": initial.params}
    if initial.batch_stats:
        variables["batch_stats"] = initial.batch_stats
    images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.float32)
    mapping = match(
        state,
        variables,
        calls=trace(program.model, images, train=False),
        names=given,
        ignore=ignore,
        keep=keep,
    )
    imported = from_torch(state, variables, mapping=mapping)
    write_run(
        output,
        preset,
        dataclasses.replace(config, workdir=output),
        dataclasses.replace(
            initial,
            params=imported["params"],
            batch_stats=imported.get("batch_stats", {}),
        ),
        {"command": "import-torch", "file": str(file), "names": given},
        force=force,
    )
    print(mapping)
    print(f"{output} holds the network as of step 0: python eval.py {output}")


def _pair(text: str) -> tuple[str, str]:
    theirs, _, ours = text.partition("=")
    if not theirs or not ours:
        raise SettingError(
            f"--names {text}: expected THEIRS=OURS, a layer or block of PyTorch and "
            "the path of ours, such as layer1=stage1.",
        )
    return theirs, ours
