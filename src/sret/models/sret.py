"""The Sliced Recursive Transformer: stem -> stages -> mean -> norm -> head, with timm's model interface.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
Letters: B batch, N tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from timm.layers import register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import dropout

from sret.errors import InputError
from sret.kernels.checkpointing import CheckpointPolicy
from sret.kernels.conditions import autocast_dtype
from sret.kernels.linear import LAYER_NORM_EPS
from sret.layers import (
    Block,
    Coefficients,
    ConvPool,
    ConvStem,
    NonLinearProjection,
    Permuter,
    PositionEmbedding,
    Recursion,
    ReversibleRecursion,
)
from sret.memory import check_memory
from sret.models.config import STEM_STRIDES, ModelConfig, StageConfig, num_stem_maps
from sret.models.cost import model_cost
from sret.models.timm_cfg import timm_cfg
from sret.models.variants import architecture_of


@register_notrace_module  # torch.fx takes a stage as one node: it draws permutations
class Stage(nn.Module):
    """(B, C, H, W) -> (B, C', H', W'): a pool (except in the first stage), then a recursion per distinct block.

    Attributes:
        permuter: the permuter of the model, which all stages share.
    """

    def __init__(
        self,
        config: StageConfig,
        model: ModelConfig,
        in_dim: int | None,
        drop_path_rates: Sequence[float],
        permuter: Permuter,
    ) -> None:
        super().__init__()
        self.permuter = permuter
        dim = config.embed_dim
        coefficients = Coefficients(
            model.learnable_residual,
            is_stream_learnable=not model.reversible,
            scale=model.residual_factor(config),
        )

        def projection() -> nn.Module:
            if config.projection_ratio is None:
                return nn.Identity()
            return NonLinearProjection(dim, config.projection_ratio, coefficients)

        kind = ReversibleRecursion if model.reversible else Recursion
        self.pool = nn.Identity() if in_dim is None else ConvPool(in_dim, dim)
        self.recursions = nn.ModuleList(
            kind(
                Block(dim, config.num_heads, config.mlp_ratio, drop_path_rate, coefficients),
                config.groups,
                [projection() for _ in config.groups],
            )
            for drop_path_rate in drop_path_rates
        )

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, N, C') and the grid (H', W'): the input of the first recursion."""
        x = self.pool(x)
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # contiguous
        if autocast_dtype(x) is not None:  # half precision would round small steps of the stream away
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, (H, W)

    def forward(self, x: Tensor) -> Tensor:
        x, (H, W) = self.tokens(x)
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            # Drawn outside the recursion, so that a recomputed pass uses the same permutation.
            permutations = [
                self.permuter(H * W, num_groups, x.device, is_training=self.training)
                if recursion.is_permuted(i)
                else None
                for i, num_groups in enumerate(recursion.groups)
            ]
            x = recursion(x, permutations)
        return x.transpose(1, 2).unflatten(2, (H, W))


class SReT(nn.Module):
    """A Sliced Recursive Transformer built from a `ModelConfig`.

    Args:
        stem_features: whether the feature maps (`feature_info`, `forward_intermediates`) begin with those inside the
            stem: strides 2 and 4 before the first stage's 8, as decoders for segmentation and detection expect them.

    Images are (B, in_chans, H, W), normalised as the weights expect (see `default_cfg`); H and W may be any sizes whose
    tokens can be sliced. `permuter` draws the token permutations: from torch's generator, unless it has a seed.
    """

    def __init__(self, config: ModelConfig, stem_features: bool = False) -> None:
        super().__init__()
        if torch.get_default_device().type == "cpu":
            check_memory("the weights", model_cost(config).bytes, "use fewer blocks, channels, classes or pixels")
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.global_pool = config.global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = config.stages[-1].embed_dim
        permuter = Permuter(config.permutation, seed=None)

        dims = [stage.embed_dim for stage in config.stages]
        self.stem = ConvStem(config.in_chans, dims[0], STEM_STRIDES[config.stem_stride])
        self.pos_embed = PositionEmbedding(dims[0], config.grids()[0])
        stages = []
        self._num_stem_maps = num_stem_maps(config.stem_stride) if stem_features else 0
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": (dims[0] // 2, dims[0])[i], "reduction": 2 ** (i + 1), "module": f"stem.bn{i + 1}"}
            for i in range(self._num_stem_maps)
        ]
        depth_before = 0
        for i, stage in enumerate(config.stages):
            # As in the authors' code, distinct block j of a stage takes the rate of layer j of that stage.
            rates = [config.drop_path_rate * (depth_before + j) / config.depth for j in range(stage.num_blocks)]
            stages.append(Stage(stage, config, dims[i - 1] if i else None, rates, permuter))
            self.feature_info.append(
                {"num_chs": dims[i], "reduction": config.stem_stride * 2**i, "module": f"stages.{i}"}
            )
            depth_before += stage.depth
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], LAYER_NORM_EPS)
        self.head = nn.Linear(dims[-1], config.num_classes) if config.num_classes else nn.Identity()
        self.set_memory(config.memory)
        self.pretrained_cfg = self.default_cfg = timm_cfg(config)
        # What timm saves for the hub, beside the configuration above.
        self._model_args = architecture_of(config)[1]
        self._traits = {"img_size": config.input_size}

    @property
    def permuter(self) -> Permuter:
        """Draws the permutations of all stages."""
        return cast(Permuter, self.stages[0].permuter)

    @permuter.setter
    def permuter(self, permuter: Permuter) -> None:
        for stage in self.stages:
            stage.permuter = permuter  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): the last stage's feature map, before pooling and norm."""
        check_images(x, self.config)
        return cast(Tensor, self.stages(self.pos_embed(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H', W') -> (B, num_classes), or the pooled and normalised (B, C) features with `pre_logits`."""
        if self.global_pool:
            x = self.norm(x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3)))
        else:
            x = self._normed_map(x)
        if pre_logits:
            return x
        return self.head(dropout(x, self.config.drop_rate, self.training))

    def _normed_map(self, x: Tensor) -> Tensor:
        """(B, C, H', W') -> the same, with the norm over the channels of each token."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

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
        check_images(x, self.config)
        num_stem, maps = self._num_stem_maps, list[Tensor]()
        take_indices, max_index = feature_take_indices(num_stem + len(self.stages), indices)
        x = self.pos_embed(self.stem(x, maps) if num_stem else self.stem(x))
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

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last requested one, and optionally norm and head; returns the kept indices."""
        num_stem = self._num_stem_maps
        take_indices, max_index = feature_take_indices(num_stem + len(self.stages), indices)
        num_stages = max(1, max_index + 1 - num_stem)
        self.stages = self.stages[:num_stages]
        self.config = replace(self.config, stages=self.config.stages[:num_stages])
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or `nn.Identity` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", "max", ""] | None = None) -> None:
        """Replaces the classifier by a new one. With 0 classes the model returns pooled features (or a map)."""
        pool = self.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        self.num_classes, self.global_pool = num_classes, pool
        like = self.stem.conv1.weight
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resizes the position embedding to images of `img_size` pixels, one number or (height, width)."""
        self.config = replace(self.config, img_size=img_size)
        self.pos_embed.set_grid(self.config.grids()[0])
        self._model_args = {**self._model_args, "img_size": self.config.input_size}
        self._traits = {**self._traits, "img_size": self.config.input_size}

    def set_memory(self, policy: str) -> None:
        """Sets the activation checkpointing policy, see `ModelConfig.memory`; weights and outputs stay the same.

        Raises `InputError` for an unknown policy, or one that does not fit the model.
        """
        parsed = CheckpointPolicy.parse(policy, self.config.reversible)
        self.config = replace(self.config, memory=policy)
        for module in self.modules():
            if isinstance(module, Recursion):
                module.policy = parsed

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: sets the memory policy "pass" (of a reversible model: "reversible"), or "none"."""
        self.set_memory("none" if not enable else "reversible" if self.config.reversible else "pass")

    def compile(self, **options: Any) -> None:
        """Compiles one pass for all recursions of equal shapes, not the unrolled model.

        Compile time does not grow with depth. `options` are those of `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, Recursion):
                module.compile(**options)

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


@register_notrace_function
def check_images(x: Tensor, config: ModelConfig) -> None:
    """Raises `InputError` if x is not (B, in_chans, H, W), or has a size that cannot be sliced."""
    if x.ndim != 4 or x.shape[1] != config.in_chans:
        raise InputError(
            f"images of shape {tuple(x.shape)}; this model takes (batch, {config.in_chans}, height, width)"
        )
    config.check((x.shape[-2], x.shape[-1]))
