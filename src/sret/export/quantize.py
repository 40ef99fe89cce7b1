"""Quantizes an ONNX model to int8, calibrated on images.

int8 is for the products with weights, which are rounded per channel, their inputs per tensor; the rest stays in
float32. With int8 convolutions too, the largest error on the digits was twice as large; int8 products inside attention
only cost time. NNCF, OpenVINO's own calibration, also corrects biases, layer by layer; here, where passes share them,
that made its errors five times as large as without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sret.export.verify import Batch


def quantized(proto: Any, calibration: Iterator[Batch], folder: Path) -> Any:
    """The model with int8 products, an `onnx.ModelProto`. `folder` takes a temporary file."""
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
        # Signed on both sides: with unsigned inputs, processors without VNNI add up in 16 bits, which overflow.
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibration_providers=["CPUExecutionProvider"],
    )
    return onnx.load(str(path))


class _Feed:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch[0].numpy()}
