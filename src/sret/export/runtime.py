"""A file that answers: what `sret export` wrote, called like a model.

    model.onnx               ONNX Runtime
    model.xml, model.bin     OpenVINO

Both say of themselves, under the names of `Stamp`, what a weights file says in its card.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sret.checkpoints.card import Card, read_card
from sret.checkpoints.resolve import resolve
from sret.errors import InputError
from sret.files import sha256_of
from sret.models.sret import SReT

ENGINES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}
DTYPES = ("float32", "bfloat16", "int8")
NAMESPACE = "sret"  # before the names in a file's metadata

# OpenVINO 2026.4 crashes where the garbage collector frees its objects in another order than it made them, so they stay
# until the process ends (docs/log.md).
_KEPT: list[tuple[Any, ...]] = []

Run = Callable[[np.ndarray], np.ndarray]  # float32 (B, C, H, W) -> (B, num_classes)


@dataclass(frozen=True)
class Stamp:
    """What a file says of itself, each under its name here: "sret.card" in ONNX, sret / card in OpenVINO.

    Attributes:
        card: a `Card` in JSON.
        dtype: "float32"; "bfloat16", what OpenVINO is to compute in; or "int8", which matrix products are in.
        version: of the sret that wrote it.
        weights: SHA-256 of the .bin beside an .xml; empty in ONNX.
    """

    card: str
    dtype: str
    version: str
    weights: str = ""


class Exported(nn.Module):
    """A model inside an engine: logits for images of one size on the CPU, any number at a time, without gradients.

    Attributes:
        engine: "ONNX Runtime" or "OpenVINO".
        dtype: as `Stamp` has it.
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
            raise InputError(f"images of shape {tuple(x.shape)}; this exported model takes (batch, {wanted})")
        logits = self._run(x.detach().to("cpu", torch.float32).contiguous().numpy())
        return torch.from_numpy(logits).to(x.device)


def load_model(source: str | os.PathLike[str]) -> tuple[SReT | Exported, Card]:
    """The model of an exported file, or of what `resolve` takes: a weights file or a published name."""
    return load_exported(source) if Path(source).suffix in ENGINES else resolve(source)


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> tuple[Exported, Card]:
    """The model of an .onnx or .xml file that `sret export` wrote, and its card.

    Args:
        threads: how many the engine takes; by default as many as PyTorch does.

    Raises `InputError` for a file that is missing, truncated or not of `sret`.
    """
    path = Path(path)
    if path.suffix not in ENGINES:
        raise InputError(f"{path}: an exported model ends in {' or '.join(ENGINES)}")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    load = _load_onnx if path.suffix == ".onnx" else _load_openvino
    run, stamp = load(path, threads or torch.get_num_threads())
    card = read_card(path, stamp.card)
    return Exported(run, card, ENGINES[path.suffix], stamp.dtype), card


def import_openvino() -> ModuleType:
    """OpenVINO without its telemetry, which reports every import to its makers unless told otherwise."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    import openvino

    return openvino


def _load_onnx(path: Path, threads: int) -> tuple[Run, Stamp]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is wrong is raised as well
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise InputError(f"{path}: not a model that ONNX Runtime can run, or a truncated one ({error})") from error
    stamp = _stamp(path, session.get_modelmeta().custom_metadata_map)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0], stamp


def _load_openvino(path: Path, threads: int) -> tuple[Run, Stamp]:
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; the weights of {path.name} belong beside it")
    with path.open("rb") as file:
        if b"<net " not in file.read(200):  # OpenVINO would try it as every format it knows, and say so at length
            raise InputError(f"{path}: not a model of OpenVINO")
    openvino = import_openvino()
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise InputError(
            f"{path}: not a model that OpenVINO can run, or a truncated one ({last_line(error)})"
        ) from error
    names = [name for name in Stamp.__dataclass_fields__ if model.has_rt_info([NAMESPACE, name])]
    stamp = _stamp(path, {f"{NAMESPACE}.{name}": model.get_rt_info([NAMESPACE, name]).value for name in names})
    if sha256_of(weights) != stamp.weights:
        raise InputError(f"{weights}: not the weights that {path.name} was written with, or damaged")
    options = {
        # Without it OpenVINO takes bfloat16 wherever the processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if stamp.dtype == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    return openvino_runner(core, model, options), stamp


def openvino_runner(core: Any, model: Any, options: Mapping[str, Any], *needed: Any) -> Run:
    """Compiles the model for the number of images in the first batch, which is faster; for other numbers, for any.

    What the model needs, such as the bytes it was read from, stays with it.
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


def _stamp(path: Path, metadata: Mapping[str, Any]) -> Stamp:
    values = {name: str(metadata.get(f"{NAMESPACE}.{name}", "")) for name in Stamp.__dataclass_fields__}
    if not values["card"]:
        raise InputError(f"{path}: an {ENGINES[path.suffix]} model, but without the metadata that `sret export` writes")
    return Stamp(**values)


def last_line(error: Exception) -> str:
    """The line that says what is wrong, below those that say where in OpenVINO."""
    return [line for line in str(error).splitlines() if line.strip()][-1]
