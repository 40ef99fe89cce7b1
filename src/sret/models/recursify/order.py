"""Checks, on sample images, that the blocks of a run follow each other: that each gets what the one before computed.

The members of an `nn.ModuleList` can also be branches, such as several heads or experts. Which they are is seen in the
graph of autograd: it leads from an input of a block to the output of the block before, whatever lies between them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sret.errors import InputError, first_line, is_out_of_memory
from sret.models.recursify.runs import Run

Model = TypeVar("Model", bound=nn.Module)


def fresh_copy(model: Model) -> Model:
    """A copy without what some models keep between calls in evaluation, such as TinyViT's biases of attention."""
    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:
        if "graph leaves" not in str(error):
            raise
        raise InputError(
            "the model cannot be copied, since a weight is computed before each call; first remove masks with "
            "torch.nn.utils.prune.remove, and old weight norms with torch.nn.utils.remove_weight_norm"
        ) from error
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, is_training in modes:
        module.training = is_training
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model and all its parts are in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def running(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Within this context an error of the model becomes an `InputError` that names the images (B, C, H, W)."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        kind = str(images.dtype).removeprefix("torch.")
        raise InputError(
            f"{type(model).__name__} does not take images {tuple(images.shape)} in {kind} on {images.device} "
            f"({first_line(error)})"
        ) from error


def check_images(model: nn.Module, images: Tensor) -> None:
    """Raises `InputError` unless these are images in a batch; an `nn.TransformerEncoder` takes sequences in a batch."""
    shape, ndim = ("(B, N, C)", 3) if isinstance(model, nn.TransformerEncoder) else ("(B, C, H, W)", 4)
    if not isinstance(images, Tensor):
        found = type(images).__name__
        raise InputError(f"images are {found}; give a float tensor {shape}, and options by name, such as passes=2")
    if images.ndim != ndim or not images.is_floating_point() or not len(images):
        found = f"{tuple(images.shape)} {images.dtype}"
        raise InputError(f"images are {found}; give a float tensor {shape}, prepared as for the model")


def check_order(model: nn.Module, runs: Sequence[Run], images: Tensor) -> None:
    """Raises `InputError` naming the first run whose blocks are not called in sequence.

    Args:
        images: (B, C, H, W); the first is used.
    """
    model = fresh_copy(model)
    calls: dict[str, list[tuple[list[Any], list[Any]]]] = {}  # ends of the graph before and after each call

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ends = [x.grad_fn for x in tensors((args, kwargs))], [y.grad_fn for y in tensors(output)]
            calls.setdefault(name, []).append(ends)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for run in runs:
            for name in run.names:
                handle = model.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
                stack.callback(handle.remove)
        with torch.inference_mode(False), torch.enable_grad(), running(model, images):
            model(images[:1].detach().clone().requires_grad_())
    for run in runs:
        for before, name in pairwise(run.names):
            follows = before in calls and name in calls and _leads_to(calls[name][0][0], calls[before][0][1])
            if not follows:
                raise InputError(
                    f"{run}: {name} does not get the output of {before}, so they are branches rather than a sequence; "
                    "choose other blocks with parts"
                )


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for value in inner for tensor in tensors(value)]


def _leads_to(starts: Sequence[Any], ends: Sequence[Any]) -> bool:
    """Whether a node of autograd's graph is one of `ends`, or has been computed from one."""
    targets = {node for node in ends if node is not None}
    waiting = [node for node in starts if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in targets:
            return True
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        waiting += new
    return False
