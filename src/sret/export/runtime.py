"""Loads files written by `sret export`, and runs them in their engine like a PyTorch model.

    model.onnx               ONNX Runtime
    model.xml, model.bin     OpenVINO

The metadata of both hold the fields of `ExportMetadata`, among them the card of a weights file.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sret.checkpoints.adapt import with_passes
from sret.checkpoints.card import Card, read_card
from sret.checkpoints.files import ENGINES
from sret.checkpoints.resolve import resolve
from sret.errors import InputError, first_line

DTYPES = ("float32", "bfloat16", "int8")
NAMESPACE = "sret"  # prefix of our names in the metadata of a file
# The digest in the metadata of a file: in ONNX, where 18 and 64 precede a text of 64 bytes; in OpenVINO's XML.
_DIGEST = re.compile(rb'(sret\.digest\x12@|<digest value=")([0-9a-f]{64})')
NO_DIGEST = "0" * 64

# OpenVINO 2026.4 crashes if the garbage collector frees its objects in another order than they were created. Therefore
# they are kept until the process ends (docs/log.md).
_KEPT: list[tuple[Any, ...]] = []

Run = Callable[[np.ndarray], np.ndarray]  # float32 (B, C, H, W) -> (B, num_classes)


@dataclass(frozen=True)
class ExportMetadata:
    """Metadata of an exported file, each under its name: "sret.card" in ONNX, sret / card in OpenVINO.

    Attributes:
        card: a `Card` in JSON.
        dtype: "float32"; "bfloat16", in which OpenVINO computes; or "int8", in which matrix products are computed.
        version: the version of sret that wrote the file.
        digest: SHA-256 of the file, with zeros in place of the digest, and of the .bin file beside an .xml file.
    """

    card: str
    dtype: str
    version: str
    digest: str = NO_DIGEST


class Exported(nn.Module):
    """An exported model in its engine: logits for batches of any number of images of one size, on the CPU.

    Attributes:
        engine: "ONNX Runtime" or "OpenVINO".
        dtype: as in `ExportMetadata`.
    """

    def __init__(self, run: Run, card: Card, engine: str, dtype: str) -> None:
        super().__init__()
        self.config = card.config
        self.num_classes = card.config.num_classes
        self.engine, self.dtype = engine, dtype
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, *input_size) -> (B, num_classes) float32. Raises `InputError` for images of another size."""
        expected = (self.config.in_chans, *self.config.input_size)
        if tuple(x.shape[1:]) != expected or not len(x):
            wanted = ", ".join(map(str, expected))
            raise InputError(f"images have shape {tuple(x.shape)}; this exported model takes (batch, {wanted})")
        try:
            logits = self._run(x.detach().to("cpu", torch.float32).contiguous().numpy())
        except Exception as error:  # the engines raise errors of many classes
            raise InputError(f"{self.engine} cannot compute the outputs: {first_line(error)}") from error
        classes = (self.num_classes,) if self.num_classes else logits.shape[1:]  # without classes: features
        if logits.shape != (len(x), *classes) or logits.dtype != np.float32:
            raise InputError(f"the outputs have shape {logits.shape}; the model has {self.num_classes} classes")
        return torch.from_numpy(logits).to(x.device)


def load_model(source: str | os.PathLike[str], passes: int | Sequence[int] | None = None) -> tuple[nn.Module, Card]:
    """The model of an exported file, or of what `resolve` takes: a weights file or a published name.

    Args:
        passes: as in `with_passes`.

    Raises `InputError` as these do, and for passes of an exported file.
    """
    if Path(source).suffix not in ENGINES:
        return with_passes(*resolve(source), passes)
    if passes is not None:
        raise InputError(f"{source} is an exported model, whose passes are fixed; export the weights with --passes")
    return load_exported(source)


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> tuple[Exported, Card]:
    """The model of an .onnx or .xml file that `sret export` wrote, and its card.

    Args:
        threads: number of CPU threads; by default that of PyTorch.

    Raises `InputError` for a file that is missing, truncated or was not written by `sret export`.
    """
    path = Path(path)
    if path.suffix not in ENGINES:
        raise InputError(f"{path}: the name of an exported model ends in {' or '.join(ENGINES)}")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".xml" and not path.with_suffix(".bin").is_file():
        raise InputError(f"{path.with_suffix('.bin')}: no such file; {path.name} needs its weights in this file")
    digest, expected = _digests(path)
    if digest != expected:
        parts = path.name if path.suffix == ".onnx" else f"{path.name} or {path.stem}.bin"
        raise InputError(f"{path}: {parts} is damaged, or of another export; export the model again")
    load = _load_onnx if path.suffix == ".onnx" else _load_openvino
    run, metadata = load(path, threads or torch.get_num_threads())
    card = read_card(path, metadata.card)
    return Exported(run, card, ENGINES[path.suffix], metadata.dtype), card


def seal(path: Path) -> None:
    """Writes the digest of a file, which has no name yet that others know, into its metadata."""
    content, digest = path.read_bytes(), _digests(path)[1].encode()
    path.write_bytes(_DIGEST.sub(lambda match: match[1] + digest, content, count=1))


def _digests(path: Path) -> tuple[str, str]:
    """The digest in an exported file, and the one that it should have. Raises `InputError` for a file without one."""
    content = path.read_bytes()
    match = _DIGEST.search(content)
    if match is None:
        raise InputError(f"{path}: without the metadata that `sret export` writes, or truncated")
    digest = hashlib.sha256(content[: match.start(2)] + NO_DIGEST.encode() + content[match.end(2) :])
    if path.suffix == ".xml":
        digest.update(path.with_suffix(".bin").read_bytes())
    return match[2].decode(), digest.hexdigest()


def import_openvino() -> ModuleType:
    """Imports OpenVINO without its telemetry, which reports each import to its developers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    import openvino

    return openvino


def run_onnx(model: bytes, engine: str, dtype: str = "float32") -> Run:
    """Runs an ONNX model in memory with "onnxruntime" or "openvino", with as many threads as PyTorch."""
    if engine == "onnxruntime":
        session = _onnx_session(model, torch.get_num_threads())
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    core = import_openvino().Core()
    return openvino_runner(core, core.read_model(model), _openvino_options(dtype, torch.get_num_threads()), model)


def _onnx_session(model: str | bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised anyway
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _load_onnx(path: Path, threads: int) -> tuple[Run, ExportMetadata]:
    import onnxruntime  # noqa: F401  (a missing package is not an error of the file)

    try:
        session = _onnx_session(str(path), threads)
        name = session.get_inputs()[0].name
    except Exception as error:  # its errors have no common class
        raise InputError(f"{path}: ONNX Runtime cannot load it ({first_line(error)})") from error
    metadata = _metadata_of(path, session.get_modelmeta().custom_metadata_map)
    return lambda x: session.run(None, {name: x})[0], metadata


def _load_openvino(path: Path, threads: int) -> tuple[Run, ExportMetadata]:
    with path.open("rb") as file:
        if b"<net " not in file.read(200):  # OpenVINO would try all formats that it knows, and print long messages
            raise InputError(f"{path}: not an OpenVINO model")
    openvino = import_openvino()
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except Exception as error:  # its errors have no common class
        raise InputError(f"{path}: OpenVINO cannot load it ({last_line(error)})") from error
    names = [name for name in ExportMetadata.__dataclass_fields__ if model.has_rt_info([NAMESPACE, name])]
    metadata = _metadata_of(path, {f"{NAMESPACE}.{name}": model.get_rt_info([NAMESPACE, name]).value for name in names})
    return openvino_runner(core, model, _openvino_options(metadata.dtype, threads)), metadata


def _openvino_options(dtype: str, threads: int) -> dict[str, Any]:
    """Options that choose the data type and the number of threads."""
    # By default OpenVINO uses bfloat16 if the processor supports it.
    return {"INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32", "INFERENCE_NUM_THREADS": threads}


def openvino_runner(core: Any, model: Any, options: Mapping[str, Any], *needed: Any) -> Run:
    """Compiles the model for the batch size of the first batch, which is faster, and once for all other batch sizes.

    Args:
        needed: objects that the model needs while it runs, such as the bytes that it was read from.
    """
    requests: dict[int | None, Any] = {}
    _KEPT.append((core, model, requests, needed))

    def run(x: np.ndarray) -> np.ndarray:
        key = len(x) if not requests or len(x) in requests else None
        if key not in requests:
            sized = model.clone()
            if key is not None:
                sized.reshape(list(x.shape))
            compiled = core.compile_model(sized, "CPU", options)
            requests[key] = compiled, compiled.create_infer_request()
        return requests[key][1].infer([x], share_inputs=True)[0]

    return run


def _metadata_of(path: Path, found: Mapping[str, Any]) -> ExportMetadata:
    values = {name: str(found.get(f"{NAMESPACE}.{name}", "")) for name in ExportMetadata.__dataclass_fields__}
    if not values["card"]:
        raise InputError(f"{path}: an {ENGINES[path.suffix]} model without the metadata that `sret export` writes")
    if values["dtype"] not in DTYPES:
        raise InputError(f"{path}: dtype {values['dtype']!r} is not one of {', '.join(DTYPES)}")
    return ExportMetadata(**values)


def last_line(error: Exception) -> str:
    """The last line of an error of OpenVINO: the reason, after lines about where in OpenVINO it occurred."""
    return [line for line in str(error).splitlines() if line.strip()][-1]
