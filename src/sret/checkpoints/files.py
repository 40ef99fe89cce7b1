"""Reads weights files safely: they cannot run code, and errors name the file and the problem."""

import argparse
import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sret.errors import InputError

StateDict = dict[str, Tensor]

CHECKSUM_KEY = "sha256"  # in the metadata of safetensors files
ENGINES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}  # by the suffix of the files that `sret export` writes


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of the contents of named tensors, and of metadata other than the checksum itself."""
    digest = hashlib.sha256()
    for name, text in sorted((metadata or {}).items()):
        if name != CHECKSUM_KEY:
            digest.update(f"{name}\0{text}\0".encode())
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_pickle(path: str | os.PathLike[str], content: BinaryIO | None = None) -> dict[str, Any]:
    """What a `torch.save` file holds, which may be tensors, plain values and an `argparse.Namespace`.

    If `content` is given, it is read instead of the file; `path` then only names it in errors.

    Raises `InputError` for a truncated or foreign file and for one that would run code.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        _check_archive(content or path, os.path.getsize(path))  # `content` is a part of this file
        with torch.serialization.safe_globals([argparse.Namespace]):
            if content is not None:
                content.seek(0)
            found = torch.load(content or path, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path)) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(f"{path}: not a PyTorch checkpoint, or a truncated one") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: contains a {type(found).__name__}, not a checkpoint")
    return found


def refuse_code(path: str | os.PathLike[str]) -> None:
    """Raises `InputError` for a file that runs code when it is read; for readers of other libraries, such as timm's.

    (timm 1.0.20 reads pickle files without this check.)
    """
    if Path(path).suffix not in (".safetensors", ".npz", ".npy"):  # these hold only arrays
        read_pickle(path)


def _check_archive(file: str | os.PathLike[str] | BinaryIO, size: int) -> None:
    """Raises `InputError` for a zip file whose members have wrong checksums, which torch does not compare.

    Also if they are larger than the file: a small one could fill the memory.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            stored = sum(member.file_size for member in archive.infolist())
            if stored > size:
                raise InputError("refused, it is compressed, which torch.save does not do")
            if (name := archive.testzip()) is not None:
                raise InputError(f"damaged, the checksum of {name} is wrong")


def _refusal(path: str | os.PathLike[str]) -> str:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive, or not even a pickle: nothing to name
        return f"{path}: not a PyTorch checkpoint, or one that would run code; it was not loaded"
    unsafe = [name for name in unsafe if name != "argparse.Namespace"]
    return (
        f"{path}: refused, it holds {', '.join(unsafe) or 'objects'} beside tensors, which could run code when loaded; "
        "only tensors, plain values and argparse.Namespace are accepted"
    )


def stored_checksum(path: str | os.PathLike[str]) -> str | None:
    """The checksum in the metadata of a safetensors file, None without one. Raises as `read_safetensors`."""
    return read_safetensors(path)[1].get(CHECKSUM_KEY)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises `InputError` if the file is missing or truncated, or if its tensors do not have the checksum of its metadata.
    """
    path = Path(path)
    if path.is_dir():
        inside = "".join(f"; did you mean {file}?" for file in sorted(path.glob("best.safetensors")))
        raise InputError(f"{path}: a folder, not a file{inside}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        hint = " (a .pth file of the authors? `sret convert` reads those)" if path.suffix in (".pth", ".pt") else ""
        if path.suffix in ENGINES:
            hint = " (an exported model; use the weights it was exported from)"
        raise InputError(f"{path}: not a safetensors file, or a truncated one{hint}") from error
    # The first versions of sret left the metadata out.
    if CHECKSUM_KEY in metadata and metadata[CHECKSUM_KEY] not in (checksum(tensors, metadata), checksum(tensors)):
        raise InputError(f"{path}: damaged, its checksum is wrong")
    return tensors, metadata
