"""Reads and writes the state of a training run: tensors and plain values, with a format number and a digest.

The file is a `torch.save` file, read with `weights_only=True`: {"format": int, "sha256": str, "content": (n,) uint8},
where the content is the state as written by `torch.save`. torch itself does not detect flipped bits in tensors.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sret.checkpoints.files import read_pickle
from sret.errors import InputError
from sret.files import write_atomically

STATE_FORMAT = 2  # other formats are refused


def save_state(path: Path, state: dict[str, Any]) -> str:
    """Writes the state to a temporary file and renames it; returns the digest of its content."""
    content, file = io.BytesIO(), io.BytesIO()
    torch.save(state, content)
    data = content.getvalue()
    kept = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    digest = hashlib.sha256(data).hexdigest()
    torch.save({"format": STATE_FORMAT, "sha256": digest, "content": kept}, file)
    write_atomically(path, file.getvalue())
    return digest


def digest_of_state(path: Path) -> str:
    """The digest that a state file holds, without reading its content; empty if there is no such file."""
    try:
        return str(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["sha256"])
    except Exception:  # missing or damaged, which can fail anywhere in the reader
        return ""


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises `InputError` for a file that is damaged, of another format, or holds code."""
    file = read_pickle(path)
    content = file.get("content")
    if file.get("format") != STATE_FORMAT or not isinstance(content, torch.Tensor):
        raise InputError(
            f"{path}: not a state of this version of sret (format {STATE_FORMAT}), perhaps of an older one; "
            "choose another --out"
        )
    data = content.numpy().tobytes()
    if hashlib.sha256(data).hexdigest() != file.get("sha256"):
        raise InputError(
            f"{path}: damaged, its checksum is wrong; restore a copy, or start again "
            "with another --out (--init takes this run's last.safetensors)"
        )
    return read_pickle(path, io.BytesIO(data))
