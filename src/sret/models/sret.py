"""The Sliced Recursive Transformer: stem -> stages -> mean -> norm -> head, keeping timm's model contract.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
Letters: B batch, N tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
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
from sret.models.config import STEM_STRIDES, ModelConfig, StageConfig


class Stage(nn.Module):
    """(B, C, H, W) -> (B, C', H', W'): a pool (but for the first stage), then a recursion per distinct block."""

    def __init__(self, config: StageConfig, model: ModelConfig, in_dim: int | None, drop_path_rates: Sequence[float]):
        super().__init__()
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
        """(B, C, H, W) -> (B, N, C') and the grid (H', W'): what the first recursion gets."""
        x = self.pool(x)
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # contiguous
        if autocast_dtype(x) is not None:  # half precision would round small steps of the stream away
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, (H, W)

    def forward(self, x: Tensor, permuter: Permuter) -> Tensor:
        x, (H, W) = self.tokens(x)
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            # Drawn out here, so that a recomputed pass sees the permutation of the first time.
            permutations = [
                permuter(H * W, num_groups, x.device, is_training=self.training) if recursion.is_permuted(i) else None
                for i, num_groups in enumerate(recursion.groups)
            ]
            x = recursion(x, permutations)
        return x.transpose(1, 2).unflatten(2, (H, W))


class SReT(nn.Module):
    """A Sliced Recursive Transformer built from a `ModelConfig`.

    Images are (B, in_chans, H, W), normalised as the weights expect (`default_cfg` says how); any H and W whose token
    counts can be sliced. `permuter` draws the token permutations; its state belongs in a checkpoint of training.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.global_pool = config.global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = config.stages[-1].embed_dim
        self.permuter = Permuter(config.permutation)

        dims = [stage.embed_dim for stage in config.stages]
        self.stem = ConvStem(config.in_chans, dims[0], STEM_STRIDES[config.stem_stride])
        self.pos_embed = PositionEmbedding(dims[0], config.grids()[0])
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        depth_before = 0
        for i, stage in enumerate(config.stages):
            # As the authors have it: distinct block j of a stage takes the rate of layer j of that stage.
            rates = [config.drop_path_rate * (depth_before + j) / config.depth for j in range(stage.num_blocks)]
            self.stages.append(Stage(stage, config, dims[i - 1] if i else None, rates))
            self.feature_info.append(
                {"num_chs": dims[i], "reduction": config.stem_stride * 2**i, "module": f"stages.{i}"}
            )
            depth_before += stage.depth
        self.norm = nn.LayerNorm(dims[-1], LAYER_NORM_EPS)
        self.head = nn.Linear(dims[-1], config.num_classes) if config.num_classes else nn.Identity()
        self.set_memory(config.memory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): the last stage's feature map, before pooling and norm."""
        self._check_image(x)
        x = self.pos_embed(self.stem(x))
        for stage in self.stages:
            x = stage(x, self.permuter)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H', W') -> (B, num_classes), or the pooled and normalised (B, C) features with `pre_logits`."""
        if self.global_pool == "avg":
            x = self.norm(x.mean((2, 3)))
        else:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if pre_logits:
            return x
        return self.head(dropout(x, self.config.drop_rate, self.training))

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

        Args:
            indices: which stages; the last n for an integer, all for `None`.
            norm: apply the final norm to the last stage's map.
            stop_early: stop after the last stage asked for.
            output_fmt: "NCHW", the only one.
            intermediates_only: return the list alone instead of (last map, list).
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r}: feature maps come as 'NCHW'")
        self._check_image(x)
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.pos_embed(self.stem(x))
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = stage(x, self.permuter)
            if i in take_indices:
                is_normed = norm and i == len(self.stages) - 1
                intermediates.append(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if is_normed else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one asked for, and norm and head if told so; returns the kept indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.config = replace(self.config, stages=self.config.stages[: max_index + 1])
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or `nn.Identity` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", ""] | None = None) -> None:
        """A fresh classifier for `num_classes`; 0 leaves pooled features, with `global_pool=""` the feature map."""
        pool = self.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        self.num_classes, self.global_pool = num_classes, pool
        like = self.stem.conv1.weight
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_memory(self, policy: str) -> None:
        """What backward keeps from now on, in the words of `ModelConfig.memory`; weights and answers stay.

        Raises `InputError` for a policy that there is not, or that does not fit the model.
        """
        parsed = CheckpointPolicy.parse(policy, self.config.reversible)
        self.config = replace(self.config, memory=policy)
        for module in self.modules():
            if isinstance(module, Recursion):
                module.policy = parsed

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: keep the input of every pass (of a reversible model: nothing), or everything."""
        self.set_memory("none" if not enable else "reversible" if self.config.reversible else "pass")

    def compile(self, **options: Any) -> None:
        """Compiles the pass of a recursion, once for all that have equal shapes, and not the unrolled model.

        That takes seconds for any depth. `options` are those of `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, Recursion):
                module.compile(**options)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters kept from weight decay although they have two dimensions or more."""
        return {"pos_embed.weight"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning-rate decay; a recursion is one layer."""
        return {
            "stem": r"^(?:stem|pos_embed)",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.pool", (0,)), (r"^stages\.(\d+)\.recursions\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _check_image(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise InputError(
                f"images of shape {tuple(x.shape)}; this model takes (batch, {self.in_chans}, height, width)"
            )
        self.config.check((x.shape[-2], x.shape[-1]))
