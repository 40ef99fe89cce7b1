"""Exits: the parts of a model that end at a classifier, so that an image can leave before the last one.

    x_1 = part_1(image),  x_2 = part_2(x_1),  ...        logits_k = classifier_k(norm(mean(x_k)))

A part is a pass of a block of the last stage (`exits="passes"`; the first part also has the stem and all earlier
stages), or a stage (`exits="stages"`). The last classifier is the model's own, so its logits are those of `forward`.

Source: early exits as in BranchyNet, Teerapittayanon et al., ICPR 2016, arXiv:1709.01686.
Letters: B batch, N tokens, C channels, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import dropout

from sret.errors import InputError
from sret.kernels.linear import LAYER_NORM_EPS
from sret.models.config import ModelConfig

if TYPE_CHECKING:
    from sret.models.sret import SReT


@dataclass(frozen=True)
class Part:
    """A part of a model that ends at an exit.

    Attributes:
        run: images (B, in_chans, H, W) for the first part, the output of the part before for others -> (B, ...).
        classify: the output of `run` -> logits (B, K).
    """

    run: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor]


def exit_heads(config: ModelConfig) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The classifiers before the last one, and their norms if they do not share the final one.

    Raises `InputError` for exits where the model has no place for one.
    """
    if config.exits != "none" and not config.num_exits:
        needed = "two stages" if config.exits == "stages" else "two passes or blocks in the last stage"
        raise InputError(f"exits {config.exits!r} needs {needed} or more; set exits to none")
    if config.exits == "stages":
        dims = [stage.embed_dim for stage in config.stages[:-1]]
        norms = nn.ModuleList(nn.LayerNorm(dim, LAYER_NORM_EPS) for dim in dims)
    else:
        dims, norms = [config.stages[-1].embed_dim] * config.num_exits, nn.ModuleList()
    return nn.ModuleList(nn.Linear(dim, config.num_classes) for dim in dims), norms


def exit_parts(model: "SReT", img_size: Sequence[int]) -> list[Part]:
    """The parts of a model for images of `img_size` (height, width) pixels, the shallowest first.

    A recursion that runs only its first passes has exits after these. In training mode the passes draw the permutations
    that `forward` would draw. Raises `InputError` for a model without exits.
    """
    if not len(model.exits):
        raise InputError("this model has no exits; train one with exits, such as --model.exits passes")
    last = len(model.stages) - 1

    def exit_of(head: int, to_map: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        def classify(x: Tensor) -> Tensor:
            x = x if to_map is None else to_map(x)
            x = x.mean((2, 3)) if model.global_pool == "avg" else x.amax((2, 3))
            x = (model.exit_norms[head] if len(model.exit_norms) else model.norm)(x)
            return model.exits[head](dropout(x, model.config.drop_rate, model.training))

        return classify

    if model.config.exits == "stages":

        def first(images: Tensor) -> Tensor:
            return model.stages[0](model.forward_stem(images))

        heads = [*(exit_of(i) for i in range(last)), model.forward_head]
        return [Part(*part) for part in zip([first, *model.stages[1:]], heads, strict=True)]

    stage, (height, width) = model.stages[last], model.config.grids((img_size[0], img_size[1]))[last]

    def tokens(images: Tensor) -> Tensor:
        x = model.forward_stem(images)
        for before in model.stages[:last]:
            x = before(x)
        return stage.tokens(x)[0]  # type: ignore[operator]

    def to_map(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (height, width))

    passes = stage.passes(height * width)  # type: ignore[operator]
    runs = [run for _, _, run in passes]
    runs[0] = _then(tokens, runs[0])
    num_passes = len(model.config.stages[last].groups)
    heads = [exit_of(i * num_passes + k, to_map) for i, k, _ in passes[:-1]]
    return [Part(*part) for part in zip(runs, [*heads, lambda x: model.forward_head(to_map(x))], strict=True)]


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))
