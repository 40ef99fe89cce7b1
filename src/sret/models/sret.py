"""The Sliced Recursive Transformer: stem -> stages -> mean -> norm -> head.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
Letters: B batch, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn.functional import dropout

from sret.errors import InputError
from sret.kernels.checkpointing import CheckpointPolicy
from sret.kernels.linear import LAYER_NORM_EPS
from sret.layers import ConvStem, Permuter, PositionEmbedding, Recursion
from sret.memory import check_memory
from sret.models.config import STEM_STRIDES, ModelConfig, num_stem_maps
from sret.models.cost import model_cost
from sret.models.exits import exit_heads, exit_parts
from sret.models.stage import Stage
from sret.models.timm.cfg import timm_cfg
from sret.models.timm.interface import TimmInterface
from sret.models.variants import architecture_of


class SReT(TimmInterface):
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
        self.exits, self.exit_norms = exit_heads(config)  # last, so that the others are drawn as without exits
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

    def forward(self, x: Tensor, passes: int | Sequence[int] | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes).

        Args:
            passes: run only the first passes, in this call; see `set_passes`. Other threads that run the same model
                meanwhile would get them too: give each thread a copy, or set the passes beforehand.
        """
        if passes is None or isinstance(passes, torch.fx.Proxy):  # torch.fx replaces also what nobody gives
            return self.forward_head(self.forward_features(x))
        before = self.passes
        self.set_passes(passes)
        try:
            return self.forward_head(self.forward_features(x))
        finally:
            self.set_passes(before)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): the last stage's feature map, before pooling and norm."""
        return cast(Tensor, self.stages(self.forward_stem(x)))

    def forward_stem(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): the input of the first stage.

        The outputs of the stem's convolutions are appended to `maps`.
        """
        check_images(x, self.config)
        return self.pos_embed(self.stem(x) if maps is None else self.stem(x, maps))

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> logits (B, num_classes) at each exit, the last ones equal to those of `forward`.

        Raises `InputError` for a model without exits, and for images of another shape than `forward` takes.
        """
        check_images(x, self.config)
        logits = []
        for part in exit_parts(self, x.shape[2:]):
            x = part.run(x)
            logits.append(part.classify(x))
        return logits

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H', W') -> (B, num_classes), or the pooled and normalised (B, C) features with `pre_logits`."""
        if self.global_pool:
            x = self.norm(x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3)))
        else:
            x = self._normed_map(x)
        if pre_logits:
            return x
        return self.head(dropout(x, self.config.drop_rate, self.training))

    @property
    def passes(self) -> tuple[int, ...]:
        """The number of passes that run in each stage."""
        return tuple(recursions[0].num_passes for recursions in self._recursions())

    def set_passes(self, passes: int | Sequence[int] | None) -> None:
        """Runs only the first passes of every recursion, from the next call on; the weights stay, also those unused.

        Args:
            passes: one number for all stages, of which a stage with fewer passes runs all; or a number for each stage.
                None, or the model's own number, for all passes: then outputs are again what they were, bit for bit.

        Raises `InputError` for a number that is not between 1 and the passes of the model.
        """
        for recursions, number in zip(self._recursions(), self.config.passes_by_stage(passes), strict=True):
            for recursion in recursions:
                recursion.max_passes = number

    def _recursions(self) -> list[list[Recursion]]:
        """The recursions of each stage."""
        return [list(cast(nn.ModuleList, stage.recursions)) for stage in self.stages]  # type: ignore[arg-type]

    def set_merge(self, config: ModelConfig) -> None:
        """Takes the `merge` fields of a configuration that is otherwise that of the model."""
        self.config = config
        for stage, stage_config in zip(self.stages, config.stages, strict=True):
            stage.merge = stage_config.merge  # type: ignore[assignment]
        self._model_args = {**architecture_of(config)[1], "img_size": config.input_size}

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

        Compile time does not grow with depth. `options` are those of `torch.compile`. Raises `InputError` for a model
        that merges tokens, in which every pass has another number of tokens.
        """
        if self.config.is_merging:
            raise InputError(
                "a model that merges tokens cannot be compiled pass by pass; set merge to (), or compile to false"
            )
        for module in self.modules():
            if isinstance(module, Recursion):
                module.compile(**options)


@register_notrace_function
def check_images(x: Tensor, config: ModelConfig) -> None:
    """Raises `InputError` if x is not (B, in_chans, H, W), or has a size that cannot be sliced."""
    if x.ndim != 4 or x.shape[1] != config.in_chans:
        raise InputError(
            f"images of shape {tuple(x.shape)}; this model takes (batch, {config.in_chans}, height, width)"
        )
    config.check((x.shape[-2], x.shape[-1]))
