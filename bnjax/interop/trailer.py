"""The line after an exported function: which JAX wrote it, and a digest of it."""

import hashlib
import json
from pathlib import Path

import jax

from bnjax.interop.torch_files import TorchError

_TRAILER = b"\nbnjax-export "


def trailer(content: bytes) -> bytes:
    """Return the last line of a file: flatbuffers reads past none of its own bytes."""
    digest = hashlib.sha256(content).hexdigest()
    described = json.dumps({"jax": jax.__version__, "sha256": digest})
    return _TRAILER + described.encode() + b"\n"


def check_trailer(path: Path, content: bytes) -> tuple[bytes, str]:
    """Return what precedes the last line, and the version of JAX that wrote it."""
    body, _, line = content.rpartition(_TRAILER)
    try:
        described = json.loads(line)
        version, digest = described["jax"], described["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise TorchError(
            f"{path} is no exported function, or is cut short: it does not end as "
            "bnjax.interop.export.save ends a file. Copy it again, or export again. "
            "What another program exported is read by jax.export.deserialize."
        ) from error
    if hashlib.sha256(body).hexdigest() != digest:
        raise TorchError(
            f"{path} is damaged: its bytes are not those that were written. Copy it "
            "again, or export again."
        )
    return body, version
