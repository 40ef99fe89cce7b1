"""Linear layers combined with a LayerNorm before them, or with a GELU before or after them.

    norm_linear(x) = W LN(x) + b        gelu_linear(h) = W GELU(h) + b        linear_gelu(x) = GELU(W x + b)

Each function contains the formula as one line, and computes it in another way where that was measured faster
(docs/performance.md):

- In training on CPUs, the outputs of norms and GELUs are recomputed in backward instead of stored. Both are cheap, and
  without them a block stores about half as much.
- On x86 CPUs, without gradients and in the forward of the autograd functions below, oneDNN adds the bias and applies
  the GELU while the product is still in cache.
- Compiled code uses the formula: compilers fuse and recompute on their own, and exporters support it.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.functional import linear as plain_linear

from sret.kernels.conditions import autocast_dtype, is_transformed

LAYER_NORM_EPS = 1e-6

# In float32 a call of oneDNN's kernel has a higher fixed cost. It is faster from this many multiply-adds of a product
# without GELU, and from this many rows of a product with GELU (docs/performance.md).
FUSED_MACS = 20_000_000
FUSED_ROWS = 150

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # of an input, a weight and a bias


def kernels_for(x: Tensor, weight: Tensor) -> tuple[Product, Product]:
    """The implementations of `linear` and `linear_gelu` that were measured faster for x and a weight of this size."""
    if not _has_fused_kernel(x, weight):
        return plain_linear, _plain_linear_gelu
    if x.dtype != torch.float32:
        return _onednn_linear, _onednn_linear_gelu
    rows = x.numel() // x.shape[-1]
    return (
        _onednn_linear if rows * weight.numel() >= FUSED_MACS else plain_linear,
        _onednn_linear_gelu if rows >= FUSED_ROWS else _plain_linear_gelu,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., C'): W x + b."""
    return kernels_for(x, weight)[0](x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., C'): GELU(W x + b), exact."""
    return kernels_for(x, weight)[1](x, weight, bias)


def _plain_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu(plain_linear(x, weight, bias))


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _onednn_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "gelu", [], "none")


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., C'): W GELU(h) + b; the GELU is recomputed in backward."""
    if is_recomputed(h):
        return _GeluLinear.apply(h, weight, bias)
    return linear(gelu(h), weight, bias)


def norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., C'): W norm(x) + b; a `LayerNorm` is recomputed in backward."""
    if is_recomputed(x) and type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None:
        return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)
    return linear(norm(x), weight, bias)


def scaled(layer: nn.Linear, scale: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of scale (W x + b): scaling weights is cheaper than scaling activations."""
    if scale is None:
        return layer.weight, layer.bias
    return scale * layer.weight, scale * layer.bias


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are plain `nn.Linear` layers, whose weights may be used directly; adapters (LoRA) are not."""
    return all(
        type(layer) is nn.Linear and layer.bias is not None and type(layer.weight) is nn.Parameter for layer in layers
    )


def is_recomputed(x: Tensor) -> bool:
    """Whether norms, GELUs and products with coefficients of x are recomputed in backward instead of stored: on CPUs.

    On an H200 a training step of `sret_t` took 85.4 ms with these autograd functions and 65.8 ms with autograd alone,
    for 2.4 instead of 5.6 GiB; memory policies save more there (docs/performance.md).
    """
    is_plain_mode = not torch.compiler.is_compiling() and not is_transformed()
    return x.device.type == "cpu" and torch.is_grad_enabled() and is_plain_mode


# Only where it was measured; bfloat16 needs a CPU with AVX-512.
_IS_SUPPORTED = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
_FUSED_DTYPES = {torch.float32}
if _IS_SUPPORTED and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _FUSED_DTYPES.add(torch.bfloat16)


def _has_fused_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's linear with fused bias and GELU, which has no backward, can compute this product."""
    return (
        _IS_SUPPORTED
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor  # neither fake nor distributed
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in _FUSED_DTYPES
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()  # the property in torch.backends takes longer
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = autocast_dtype(h) or weight.dtype
        ctx.save_for_backward(h, weight)
        ctx.dtype, ctx.bias_dtype = dtype, bias.dtype
        return linear(gelu(h).to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        for_h, for_weight, for_bias = ctx.needs_input_grad
        grad_h = grad_weight = None
        if for_h:
            grad_h = torch.ops.aten.gelu_backward((grad @ weight.to(ctx.dtype)).to(h.dtype), h)
        if for_weight:
            grad_weight = _weight_grad(grad, gelu(h), weight.dtype)
        return grad_h, grad_weight, _bias_grad(grad, ctx.bias_dtype) if for_bias else None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        dtype, ctx.x_dtype = autocast_dtype(x) or weight.dtype, x.dtype
        x = x.to(norm_weight.dtype)  # autocast may leave x in half precision; CUDA's layer norm needs one dtype
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        ctx.eps, ctx.dtype, ctx.bias_dtype = eps, dtype, bias.dtype
        return linear(y.to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        for_x, for_norm_weight, for_norm_bias, _, for_weight, for_bias = ctx.needs_input_grad
        C, mask = x.shape[-1:], [for_x, for_norm_weight, for_norm_bias]
        grad_x, grad_norm, grad_weight = None, [None, None], None
        if any(mask):
            grad_y = (grad @ weight.to(ctx.dtype)).to(x.dtype)
            grad_x, *grad_norm = torch.ops.aten.native_layer_norm_backward(
                grad_y, x, C, mean, rstd, norm_weight, norm_bias, mask
            )
        if for_weight:
            y = torch.native_layer_norm(x, C, norm_weight, norm_bias, ctx.eps)[0]
            grad_weight = _weight_grad(grad, y, weight.dtype)
        grad_x = None if grad_x is None else grad_x.to(ctx.x_dtype)
        return grad_x, *grad_norm, None, grad_weight, _bias_grad(grad, ctx.bias_dtype) if for_bias else None


def _weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad.reshape(-1, grad.shape[-1]).T @ x.to(grad.dtype).reshape(-1, x.shape[-1])).to(dtype)


def _bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)
