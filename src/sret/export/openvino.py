"""Writes an ONNX model in OpenVINO's format: an .xml, and a .bin with the weights beside it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sret.errors import InputError
from sret.export.runtime import NAMESPACE, Stamp, import_openvino, last_line
from sret.files import sha256_of


def write_openvino(proto: Any, stamp: Stamp, path: Path) -> None:
    """Writes the model with its stamp and the digest of its weights. Raises `InputError` if OpenVINO cannot."""
    openvino = import_openvino()
    model = openvino.Core().read_model(proto.SerializeToString())
    try:
        openvino.save_model(model, path, compress_to_fp16=stamp.dtype == "bfloat16")  # it has no bfloat16 weights
        for name, text in asdict(replace(stamp, weights=sha256_of(path.with_suffix(".bin")))).items():
            model.set_rt_info(text, [NAMESPACE, name])
        openvino.save_model(model, path, compress_to_fp16=stamp.dtype == "bfloat16")
    except RuntimeError as error:
        raise InputError(f"{path}: OpenVINO could not write it ({last_line(error)})") from error
