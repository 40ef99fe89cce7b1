"""Quantizes an ONNX model to int8, calibrated on images.

Products with weights are int8: weights are quantized per channel, their inputs per tensor. The rest stays in float32.
With int8 convolutions the largest error on the digits was twice as large, and int8 products inside attention were
slower. NNCF, OpenVINO's tool, also corrects biases layer by layer. Here passes share the biases, and its errors were
five times as large with the correction as without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sret.export.verify import Batch


def quantized(proto: Any, calibration: Iterator[Batch], folder: Path) -> Any:
    """The model with int8 products, an `onnx.ModelProto`; a temporary file is written to `folder`."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [n.name for n in proto.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    path = folder / "quantized.onnx"
    quantize_static(
        proto,
        str(path),
        _Feed(calibration),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=products,
        per_channel=True,
        # Signed weights and inputs: with unsigned inputs, processors without VNNI sum in 16 bits, which overflow.
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibration_providers=["CPUExecutionProvider"],
    )
    return onnx.load(str(path))


class _Feed:
    """Batches in the form that ONNX Runtime's calibration reads."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch[0].numpy()}
