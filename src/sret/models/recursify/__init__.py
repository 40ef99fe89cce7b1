"""Makes a recursive model of any vision transformer: blocks share their weights, or run more than once.

The body of the model is found by its structure (`sret.models.recursify.runs`). Blocks keep their places and names, so
features, checkpointing of gradients, parameter groups and exporters of the model's library work as before.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from sret.models.recursify.cost import RecursifyCost, recursify_cost
from sret.models.recursify.order import fresh_copy
from sret.models.recursify.passes import add_passes
from sret.models.recursify.plan import found_groups, make_plan
from sret.models.recursify.runs import Run, find_runs
from sret.models.recursify.sharing import Base, tie
from sret.models.recursify.similarity import Call, Distance, closest_base, record, recursify_distance
from sret.models.recursify.slicing import Slicing, slice_attention
from sret.models.timm.config import Sharing, sharing_of

__all__ = [
    "Distance",
    "RecursifyCost",
    "Run",
    "Sharing",
    "find_runs",
    "found_groups",
    "recursify",
    "recursify_cost",
    "recursify_distance",
]

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # its parameters could not be trained later
def recursify(model: Model, images: Tensor | None = None, **options: object) -> Model:
    """A copy of a model in which blocks share weights or run more than once.

    Args:
        model: any module with equal blocks in sequence: a vision transformer of timm, an `nn.TransformerEncoder`, ...
        images: (B, C, H, W), a few images as the model takes them; share="similar" and init="closest" need them. With
            images the model given is run, to check that its blocks follow each other; without, the members of an
            `nn.ModuleList` are taken for a sequence.
        options: `passes`, `extra_passes`, `share`, `init`, `group_sizes`, `rank`, `slices`, `scale`, `projection`,
            `damping`, `parts`; see `Sharing`.

    Shared parameters are the same object in all places, so optimizers and `parameters()` see them once.
    `safetensors.torch.save_model` writes them once.

    Raises `InputError` for a model without equal blocks or whose blocks share weights already or are branches, for
    passes that do not divide the blocks, for a rank above the width, for more than 20,000 runs of blocks, and for
    options without effect.
    """
    sharing = sharing_of(options)
    plan = make_plan(model, sharing, images)
    model = fresh_copy(model)
    calls: dict[str, Call] = {}
    if sharing.init == "closest" and images is not None:
        calls, _ = record(model, [name for run in plan for name in run.names], images)
    for run, of_run in plan.items():
        for group in of_run:
            for position in range(len(run.units[0])):
                names = [run.units[unit][position] for unit in group]
                blocks = [model.get_submodule(name) for name in names]
                if len(blocks) > 1:
                    base: Base = "mean" if sharing.init == "mean" else 0
                    if sharing.init == "closest":
                        base = closest_base(blocks, [calls[name] for name in names], sharing.rank)
                    tie(blocks, base, sharing.rank)
                for i, (block, num_groups) in enumerate(zip(blocks, sharing.slices, strict=False)):
                    if num_groups > 1:
                        slice_attention(block, Slicing(num_groups, getattr(model, "num_prefix_tokens", 0), i > 0))
    if sharing.extra_passes or sharing.scale != "none" or sharing.projection:
        _avoid_nested_tensors(model)
        for name in (name for run in plan for name in run.names):
            block = model.get_submodule(name)
            add_passes(block, sharing.extra_passes, sharing.scale, sharing.damping, sharing.projection)
    return model


def _avoid_nested_tensors(model: nn.Module) -> None:
    """With a padding mask torch's encoder packs its tokens into nested tensors, which cannot be added by shares."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
