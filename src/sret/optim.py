"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

import math

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW; biases, norms, residual coefficients and the position embedding are not decayed (timm's rule)."""
    return create_optimizer_v2(model, opt="adamw", lr=learning_rate, weight_decay=weight_decay)


def cosine_with_warmup(step: int, total_steps: int, warmup_steps: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear to 1 over the warm-up, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
