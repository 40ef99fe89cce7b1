"""Says which kernels a model uses on a GPU, and why."""

import torch
from torch import nn

from sret.kernels.gpu import dispatch
from sret.layers.residual import LearnableResidual
from sret.layers.reversible import ReversibleRecursion


def gpu_path(model: nn.Module) -> str:
    """One line: how many residual branches of the model run in Triton kernels in bfloat16 or float16, and why not all.

    Without a GPU the line says what a GPU of compute capability 8.0 or more would do. The model may be on any device.
    """
    if (reason := dispatch.off()) is not None:
        return f"PyTorch's kernels: {reason}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_gpu = device.type == "cuda"
    if has_gpu and (reason := dispatch.device_refusal(device)) is not None:
        return f"PyTorch's kernels: {reason}"
    if any(isinstance(module, ReversibleRecursion) for module in model.modules()):
        return "PyTorch's kernels: the model is reversible"
    residuals = [module for module in model.modules() if isinstance(module, LearnableResidual)]
    reasons = [reason for residual in residuals if (reason := _refusal(residual, device)) is not None]
    counts = {reason: reasons.count(reason) for reason in reasons}
    where = "" if has_gpu else f", compute capability {'.'.join(map(str, dispatch.MIN_CAPABILITY))} or more"
    share = f"for {len(residuals) - len(reasons)} of {len(residuals)} branches"
    text = f"Triton kernels in bfloat16 and float16{where}, {share}"
    return "; ".join([text, *(f"not for {count}: {reason}" for reason, count in counts.items())])


def _refusal(residual: LearnableResidual, device: torch.device) -> str | None:
    norm = residual.norm
    channels = norm.normalized_shape[-1] if isinstance(norm, nn.LayerNorm) else 1
    x = torch.empty(1, 1, channels, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        return residual.weights_refusal() or residual.size_refusal(x)
