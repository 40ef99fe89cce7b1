"""Writes an ONNX model in OpenVINO's format: an .xml file, and a .bin file with the weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sret.errors import InputError
from sret.export.runtime import NAMESPACE, ExportMetadata, import_openvino, last_line, seal


def write_openvino(proto: Any, metadata: ExportMetadata, path: Path) -> None:
    """Writes the model with its metadata. Raises `InputError` if OpenVINO fails."""
    openvino = import_openvino()
    model = openvino.Core().read_model(proto.SerializeToString())
    is_half = metadata.dtype == "bfloat16"  # weights are stored as float16: OpenVINO has no bfloat16 weights
    try:
        for name, text in asdict(metadata).items():
            model.set_rt_info(text, [NAMESPACE, name])
        openvino.save_model(model, path, compress_to_fp16=is_half)
    except RuntimeError as error:
        raise InputError(f"{path}: OpenVINO could not write the file ({last_line(error)})") from error
    seal(path)
