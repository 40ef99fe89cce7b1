"""Converts a model to ONNX, with each weight once, for ONNX Runtime and for OpenVINO.

fuse -> torch.export -> ONNX -> constants folded, equal subgraphs merged

With early exit after passes, the weights of all branches are in the main graph, so that each is there once. ONNX
Runtime is slower with weights outside of a branch, so those of stages, which no other branch uses, stay there.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sret.elastic import ExitPolicy
from sret.export.exits import ExitGraph, with_exits
from sret.export.runtime import NAMESPACE, ExportMetadata, seal
from sret.models.fuse import fuse
from sret.models.sret import SReT

OPSET = 20  # the first with GELU
NO_LIMIT = 2**62  # bytes
# The rules of onnxscript that simplify our graphs; its first versions lack the last one.
REWRITES = ("mul_by_1_rule", "squeeze_reshape_1d_rule", "materialize_reshape_shape_rule")


def to_onnx(model: nn.Module, image: tuple[int, int, int], policy: ExitPolicy | None = None) -> Any:
    """The model as an `onnx.ModelProto`: "images" (batch, *image) -> "logits" (batch, num_classes).

    With a policy, images leave the model, an `SReT` with exits, early.
    """
    import onnx_ir
    import onnxscript.optimizer  # noqa: F401 (if it is missing, this import names it; torch would raise another error)

    fused = fuse(model) if isinstance(model, SReT) else model
    images = torch.zeros(2, *image)
    with torch.no_grad():
        fused(images)  # computes the permutations, which become constants
        net = fused if policy is None else ExitGraph(with_exits(fused, "the model"), image[1:], policy)
        program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
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
    _simplify(graph, share_weights=isinstance(net, ExitGraph) and net.has_shared_weights)
    return onnx_ir.to_proto(graph)


def _simplify(graph: Any, share_weights: bool) -> None:
    """Folds constants and merges equal subgraphs, so that what depends only on weights is computed once.

    The time grows linearly with the number of passes. `onnxscript.optimizer.optimize` would do the same, but in
    quadratic time: one of its rules compares all pairs of nodes.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    known = [getattr(rules, name) for name in REWRITES if hasattr(rules, name)]
    rewrite = rewriter.RewritePass(rewriter.RewriteRuleSet(known, commute=True))
    limits = {"input_size_limit": NO_LIMIT, "output_size_limit": NO_LIMIT}
    common.CommonSubexpressionEliminationPass()(graph)  # before weights are transposed, once for each pass
    for _ in range(2):  # folding constants lets rules match, and the other way round
        optimizer.fold_constants(graph, onnx_shape_inference=True, **limits)
        rewrite(graph)
        common.RemoveUnusedNodesPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    if share_weights:
        common.LiftSubgraphInitializersToMainGraphPass()(graph)
    common.DeduplicateInitializersPass(size_limit=NO_LIMIT)(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)


def write_onnx(proto: Any, metadata: ExportMetadata, path: Path) -> None:
    """Writes the model with its metadata."""
    for name, text in asdict(metadata).items():
        proto.metadata_props.add(key=f"{NAMESPACE}.{name}", value=text)
    path.write_bytes(proto.SerializeToString())
    seal(path)
