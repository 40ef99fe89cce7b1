"""Writes a model as ONNX, each weight once, for ONNX Runtime and as the first step for OpenVINO.

fuse -> torch.export -> ONNX -> constants computed once, equal subgraphs merged
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sret.export.runtime import NAMESPACE, Stamp
from sret.models.fuse import fuse
from sret.models.sret import SReT

OPSET = 20  # the first with GELU
NO_LIMIT = 2**62  # bytes
# What our graphs have a use for of onnxscript's rules; its first versions lack the last.
REWRITES = ("mul_by_1_rule", "squeeze_reshape_1d_rule", "materialize_reshape_shape_rule")


def to_onnx(model: SReT, img_size: tuple[int, int]) -> Any:
    """The fused model as an `onnx.ModelProto`: "images" (batch, C, *img_size) -> "logits" (batch, num_classes)."""
    import onnx_ir
    import onnxscript.optimizer  # noqa: F401 (if it is missing, that is said here, before torch says it in its words)

    fused = fuse(model)
    images = torch.zeros(2, fused.in_chans, *img_size)
    with torch.no_grad():
        fused(images)  # the permutations are known now, and become constants
        program = torch.export.export(fused, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        onnx_program = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    graph = onnx_program.model
    _simplify(graph)
    return onnx_ir.to_proto(graph)


def _simplify(graph: Any) -> None:
    """What depends on weights alone is computed, once for all passes, in a time that grows with their number.

    That of `onnxscript.optimizer.optimize`, which does the same, grows with its square: one of its rules, for slices
    that make up a split, compares all pairs of nodes.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    known = [getattr(rules, name) for name in REWRITES if hasattr(rules, name)]
    rewrite = rewriter.RewritePass(rewriter.RewriteRuleSet(known, commute=True))
    limits = {"input_size_limit": NO_LIMIT, "output_size_limit": NO_LIMIT}
    common.CommonSubexpressionEliminationPass()(graph)  # before weights are transposed, once for each pass
    for _ in range(2):  # rules find more where constants are folded, and the other way round
        optimizer.fold_constants(graph, onnx_shape_inference=True, **limits)
        rewrite(graph)
        common.RemoveUnusedNodesPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.DeduplicateInitializersPass()(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)


def write_onnx(proto: Any, stamp: Stamp, path: Path) -> None:
    """Writes the model with its stamp in the metadata."""
    for name, text in asdict(stamp).items():
        proto.metadata_props.add(key=f"{NAMESPACE}.{name}", value=text)
    path.write_bytes(proto.SerializeToString())
