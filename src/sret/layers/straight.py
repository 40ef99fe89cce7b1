"""A pass without gradients as one straight line of kernels, on the way of which no module is called.

    x <- a1 x + a2 W_o Attention(W_qkv LN(x))
    x <- a3 x + a4 W_2 GELU(W_1 LN(x))             and the same once more for a projection

It computes what `one_pass` computes in evaluation. For one small picture Python takes as long to call modules and to
look up their parts as the processor takes for the products (docs/performance.md); here both are done once. What was
looked up is compared with what is there in every pass, so that a layer, a weight or a hook that came later counts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sret.layers.attention import AttentionResidual, strided_attention
from sret.layers.block import Block, one_pass
from sret.layers.context import autocast_dtype, is_listened_to, is_transformed
from sret.layers.linear import Product, kernels_for
from sret.layers.mlp import MlpResidual
from sret.layers.permute import Permutation, StridedPermutation
from sret.layers.projection import NonLinearProjection

Step = Callable[[Tensor, int, Permutation | None], Tensor]


class StraightPasses:
    """Stands in for `one_pass` in a recursion; it is `one_pass` in training and where gradients are wanted.

    Args:
        num_passes: how many lines are kept, one for each projection.
    """

    def __init__(self, num_passes: int) -> None:
        self.num_passes = num_passes
        self._lines: dict[nn.Module, _Line] = {}

    def __call__(
        self, block: Block, projection: nn.Module, x: Tensor, num_groups: int, permutation: Permutation | None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        steps = None
        if torch.is_grad_enabled() or block.training:
            self._lines.clear()  # which hold weights that may be replaced meanwhile
        elif not (torch.compiler.is_compiling() or autocast_dtype(x) or is_transformed() or is_listened_to()):
            line = self._lines.get(projection)
            if line is None or not line.is_current():
                if len(self._lines) == self.num_passes:
                    self._lines.clear()
                line = self._lines[projection] = _Line(block, projection)
            steps = line.steps
        if steps is None:
            return one_pass(block, projection, x, num_groups, permutation)
        for step in steps:
            x = step(x, num_groups, permutation)
        return x


class _Line:
    """The steps of a pass, or None where a layer is not one of ours, and all that they were made of."""

    def __init__(self, block: Block, projection: nn.Module) -> None:
        residuals = [block.attn, block.mlp, *([] if type(projection) is nn.Identity else [projection])]
        modules = [*block.modules(), *projection.modules()]
        tables = [table for module in modules for table in (module._modules, module._parameters)]
        self._parts = [(table, name, part) for table in tables for name, part in table.items()]
        # These numbers are no parts of a module, but of its answer.
        self._parts += [(m.__dict__, k, m.__dict__[k]) for m in modules for k in ("eps", "scale") if k in m.__dict__]
        self._lengths = [(values, len(values)) for values in (*tables, *(module.__dict__ for module in modules))]
        self._states = [(module.__dict__, _state(module.__dict__)) for module in modules]
        steps = [step for residual in residuals if (step := _step(residual)) is not None]
        is_quiet = not any(module.training for module in modules) and not is_listened_to(*modules)
        self.steps = steps if len(steps) == len(residuals) and type(block) is Block and is_quiet else None

    def is_current(self) -> bool:
        """Whether the modules have the same parts, mode and hooks as when the line was made."""
        for table, name, part in self._parts:
            if table.get(name) is not part:
                return False
        for values, length in self._lengths:
            if len(values) != length:
                return False
        return all(_state(values) == state for values, state in self._states)


def _state(values: dict[str, Any]) -> tuple[bool, bool]:
    return values["training"], bool(values["_forward_hooks"] or values["_forward_pre_hooks"])


def _step(residual: nn.Module) -> Step | None:
    """One residual, or None if it has layers that must be called."""
    if not isinstance(residual, AttentionResidual | MlpResidual) or not residual.is_known():
        return None
    if type(residual) not in (AttentionResidual, MlpResidual, NonLinearProjection):
        return None
    norm, first, last = residual.norm, residual.first_layer(), residual.last_layer()
    if type(norm) is not nn.LayerNorm:
        return None
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    shape, eps = norm.normalized_shape, norm.eps
    norm_weight, norm_bias = norm.weight, norm.bias
    w1, b1, w2, b2 = first.weight, first.bias, last.weight, last.bias

    def end(x: Tensor, y: Tensor, linear: Product) -> Tensor:
        """alpha x + beta (W_o y + b_o), multiplying with beta what are fewer numbers."""
        alpha, beta = residual.stream_factor(), residual.branch_factor()
        if beta is None:
            y = linear(y, w2, b2)
        elif y.numel() < w2.numel():
            y = linear(y, w2, b2) * beta
        else:
            y = linear(y, beta * w2, beta * b2)
        return x + y if alpha is None else torch.addcmul(y, x, alpha)

    def mlp(x: Tensor, num_groups: int, permutation: Permutation | None) -> Tensor:
        linear, linear_gelu = kernels_for(x, w1)
        y = torch.layer_norm(x, shape, norm_weight, norm_bias, eps)
        return end(x, linear_gelu(y, w1, b1), linear)

    if isinstance(residual, MlpResidual):
        return mlp
    attn = residual.branch

    def attention(x: Tensor, num_groups: int, permutation: Permutation | None) -> Tensor:
        linear, _ = kernels_for(x, w1)
        y = torch.layer_norm(x, shape, norm_weight, norm_bias, eps)
        if isinstance(permutation, StridedPermutation) and x.shape[1] % num_groups == 0:
            y = strided_attention(lambda *w: linear(y, *w), w1, b1, attn.num_heads, num_groups)
        else:
            if permutation is not None:
                y = permutation.apply(y)
            y = attn.within_slices(linear(y, w1, b1), num_groups)
            if permutation is not None:
                y = permutation.undo(y)
        return end(x, y, linear)

    return attention
