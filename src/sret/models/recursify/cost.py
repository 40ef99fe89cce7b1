"""Computes what a recursive model costs before it is built: its parameters, and its multiply-adds (MACs).

    parameters = original - (passes - 1) blocks + rank (out + in) a matrix and pass + scales, gates and projections
    MACs = original + extra_passes blocks + projections - what slices of the attention save

The original is run once without data (on the meta device), which counts convolutions and products of matrices. As in
`sret.models.cost`, norms, activations, softmax, biases and additions are not counted; a MAC is 2 FLOPs.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sret.errors import InputError
from sret.kernels.slices import slice_lengths
from sret.models.recursify.order import evaluating, running, tensors
from sret.models.recursify.passes import check_stream, scale_size, stream_width
from sret.models.recursify.plan import Plan, make_plan
from sret.models.recursify.sharing import matrix_shape
from sret.models.recursify.slicing import check_sliceable
from sret.models.timm.config import Sharing, sharing_of


@dataclass(frozen=True)
class RecursifyCost:
    """A recursive model and the original.

    Attributes:
        parameters: shared ones counted once.
        macs: for one image, without those of the corrected matrices.
        correction_macs: to compute the corrected matrices of all passes (`rank`) from their factors, each once. They do
            not depend on the number of images, and are none if the corrected matrices are stored for inference.
        original_parameters: of the model given.
        original_macs: of the model given, for one image.
    """

    parameters: int
    macs: int
    correction_macs: int
    original_parameters: int
    original_macs: int


def recursify_cost(model: nn.Module, input_size: tuple[int, int, int], **options: Any) -> RecursifyCost:
    """The cost of `recursify(model, **options)`, which is not built.

    Args:
        model: as `recursify` takes it; it may be on the meta device, without weights.
        input_size: channels, height and width of an image, in pixels.
        options: those of `recursify`.

    Raises `InputError` where `recursify` and the model that it returns do, for an image of a size that the model does
    not take, for slices that the tokens cannot form, and for share="similar" with rank, whose groups depend on images.
    """
    if not isinstance(input_size, Sequence):
        raise InputError(f"input_size is {input_size!r}; give channels, height and width, such as (3, 224, 224)")
    sharing = sharing_of(options)
    if sharing.share == "similar" and not sharing.group_sizes:
        if sharing.rank:
            raise InputError('share="similar" with rank needs group_sizes: a block alone in its group is not corrected')
        sharing = replace(sharing, share="sequence", init="first")
    plan = make_plan(model, replace(sharing, init="first"))
    counted = _measure(model, input_size, [name for run in plan for name in run.names])
    original = sum(parameter.numel() for parameter in model.parameters())
    shared = [
        [model.get_submodule(run.units[unit][position]) for unit in group]
        for run, groups in plan.items()
        for group in groups
        for position in range(len(run.units[0]))
    ]
    factors = [
        (out + of, min(sharing.rank, out, of), out * of)
        for blocks in shared
        if sharing.rank and len(blocks) > 1
        for block in blocks
        for out, of in map(matrix_shape, _matrices(block))
    ]
    added = [_added(model.get_submodule(name), counted.blocks[name], sharing) for run in plan for name in run.names]
    runs = 1 + sharing.extra_passes
    saved = sum(_saved(model, counted, sharing, plan))
    return RecursifyCost(
        parameters=original
        - sum((len(blocks) - 1) * _tied(blocks[0], sharing.rank) for blocks in shared)
        + sum(rank * sizes for sizes, rank, _ in factors)
        + sum(parameters for parameters, _ in added),
        macs=counted.macs
        + sharing.extra_passes * sum(block.macs for block in counted.blocks.values())
        + sum(macs for _, macs in added)
        - runs * saved,
        correction_macs=sum(rank * area for _, rank, area in factors),
        original_parameters=original,
        original_macs=counted.macs,
    )


def _matrices(block: nn.Module) -> list[Tensor]:
    return [parameter for _, parameter in block.named_parameters(remove_duplicate=False) if parameter.ndim >= 2]


def _tied(block: nn.Module, rank: int) -> int:
    """Numbers that blocks have in common; with corrections, those of their matrices."""
    return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim >= 2 or not rank)


@dataclass
class _Block:
    """What one block does for an image: MACs, the shape of its output, and H, N and 2 D of each attention."""

    macs: int = 0
    output: tuple[int, ...] = ()
    attention: list[tuple[int, int, int]] = field(default_factory=list)


def _added(block: nn.Module, counted: _Block, sharing: Sharing) -> tuple[int, int]:
    """Parameters and MACs of what each run of a block gets of its own."""
    runs = 1 + sharing.extra_passes
    parameters = sharing.extra_passes + scale_size(block, sharing.scale)
    if not sharing.projection:
        return parameters, 0
    width = stream_width(block)
    check_stream(counted.output, width)
    return parameters + runs * (2 * width**2 + 4 * width + 2), runs * math.prod(counted.output) * 2 * width


def _saved(model: nn.Module, counted: "_Counted", sharing: Sharing, plan: Plan) -> Iterator[int]:
    """MACs that slices save in one run of each block."""
    P = getattr(model, "num_prefix_tokens", 0)
    for run, groups in plan.items():
        for group in groups:
            for unit, num_groups in zip(group, sharing.slices, strict=False):
                for name in run.units[unit] if num_groups > 1 else ():
                    check_sliceable(model.get_submodule(name))
                    for H, N, dims in counted.blocks[name].attention:
                        pairs = sum(count * n * (P + n) for count, n in slice_lengths(N - P, num_groups))
                        yield H * dims * (N * N - P * N - pairs)


class _Counted(TorchDispatchMode):
    """Counts MACs, also of the blocks that are running."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.macs = 0
        self.blocks = {name: _Block() for name in names}
        self.running: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            macs = count(*args, **(kwargs or {}), out_val=out) // 2
            self.macs += macs
            for name in self.running:
                self.blocks[name].macs += macs
        return out


class _Attention(TorchFunctionMode):
    """Notes the shapes of attention in the blocks that are running."""

    def __init__(self, counted: _Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            q, _, v = args[:3]
            for name in self.counted.running:
                self.counted.blocks[name].attention.append((q.shape[1], q.shape[2], q.shape[3] + v.shape[3]))
        return func(*args, **(kwargs or {}))


def _measure(model: nn.Module, input_size: Sequence[int], names: Sequence[str]) -> _Counted:
    """Runs a copy of the model without weights on one image without pixels."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    copied: dict[int, Any] = {}
    for _, x in named:
        empty = x.detach().to("meta")
        copied[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
    net = copy.deepcopy(model, copied)
    counted = _Counted(names)

    def end(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            counted.running.remove(name)
            counted.blocks[name].output = tuple(tensors(output)[0].shape)

        return hook

    for name in names:
        block = net.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: counted.running.append(name))
        block.register_forward_hook(end(name))
    with ExitStack() as stack:
        for context in (evaluating(net), torch.no_grad(), _without_fast_path(), _Attention(counted), counted):
            stack.enter_context(context)
        image = torch.empty(1, *input_size, device="meta")
        stack.enter_context(running(net, image))
        net(image)
    return counted


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's encoder layers run as a single function for inference, which cannot be counted."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
