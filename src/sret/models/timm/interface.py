"""What timm expects of a model: feature maps, classifier, checkpointing, groups of parameters.

Letters: B batch, C channels.
"""

from dataclasses import replace
from typing import Any, Literal

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sret.errors import InputError
from sret.layers import ConvStem, PositionEmbedding
from sret.models.config import ModelConfig
from sret.models.exits import exit_heads


class TimmInterface(nn.Module):
    """The methods of timm's models, for `SReT`, which has the attributes."""

    config: ModelConfig
    num_classes: int
    num_features: int
    global_pool: Literal["avg", "max", ""]
    stem: ConvStem
    pos_embed: PositionEmbedding
    stages: nn.Sequential
    norm: nn.Module
    head: nn.Module
    exits: nn.ModuleList
    exit_norms: nn.ModuleList
    _num_stem_maps: int
    _model_args: dict[str, Any]
    _traits: dict[str, Any]

    def forward_stem(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The input of the first stage, see `SReT.forward_stem`."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps (B, C, H', W') of the stages, before the pool that follows each.

        With `stem_features` those of the stem come first.

        Args:
            indices: which maps; the last n for an integer, all for `None`.
            norm: apply the final norm to the last stage's map.
            stop_early: stop after the last requested map.
            output_fmt: "NCHW", or "NHWC" for (B, H', W', C).
            intermediates_only: return the list alone instead of (last map, list).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError(f"output_fmt {output_fmt!r} is not one of NCHW, NHWC")
        num_stem, maps = self._num_stem_maps, list[Tensor]()
        take_indices, max_index = feature_take_indices(num_stem + len(self.stages), indices)
        x = self.forward_stem(x, maps if num_stem else None)
        intermediates = [maps[i] for i in range(num_stem) if i in take_indices]
        maps.clear()  # frees those that are not taken
        for i, stage in enumerate(self.stages, num_stem):
            if stop_early and i > max_index:
                break
            x = stage(x)
            if i in take_indices:
                is_normed = norm and stage is self.stages[-1]
                intermediates.append(self._normed_map(x) if is_normed else x)
        if output_fmt == "NHWC":
            intermediates = [y.permute(0, 2, 3, 1) for y in intermediates]
        return intermediates if intermediates_only else (x, intermediates)

    def _normed_map(self, x: Tensor) -> Tensor:
        """(B, C, H', W') -> the same, with the norm over the channels of each token."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last requested one, and optionally norm and head; returns the kept indices."""
        num_stem = self._num_stem_maps
        take_indices, max_index = feature_take_indices(num_stem + len(self.stages), indices)
        num_stages = max(1, max_index + 1 - num_stem)
        self.stages = self.stages[:num_stages]
        self.config = replace(self.config, stages=self.config.stages[:num_stages], exits="none")
        self.exits, self.exit_norms = exit_heads(self.config)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or `nn.Identity` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", "max", ""] | None = None) -> None:
        """Replaces the classifier, and those of exits, by new ones.

        With 0 classes the model returns pooled features (or a map), and has no exits any more.
        """
        pool = self.global_pool if global_pool is None else global_pool
        exits = self.config.exits if num_classes else "none"
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool, exits=exits)
        self.num_classes, self.global_pool = num_classes, pool
        like = self.stem.conv1.weight
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.exits, self.exit_norms = (heads.to(like.device, like.dtype) for heads in exit_heads(self.config))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resizes the position embedding to images of `img_size` pixels, one number or (height, width)."""
        self.config = replace(self.config, img_size=img_size)
        self.pos_embed.set_grid(self.config.grids()[0])
        self._model_args = {**self._model_args, "img_size": self.config.input_size}
        self._traits = {**self._traits, "img_size": self.config.input_size}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that get no weight decay although they have two dimensions or more."""
        return {"pos_embed.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning-rate decay; a recursion is one layer."""
        return {
            "stem": r"^(?:stem|pos_embed)",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.pool", (0,)), (r"^stages\.(\d+)\.recursions\.(\d+)", None), (r"^norm", (99999,))],
        }
