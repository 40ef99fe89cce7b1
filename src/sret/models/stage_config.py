"""Configuration of a stage: a frozen dataclass that checks its values.

Letters: C channels. A *layer* is one pass of attention and MLP.
"""

from dataclasses import dataclass, replace
from itertools import chain

from sret.errors import InputError
from sret.kernels.slices import merged_lengths, slice_lengths
from sret.ranges import Channels, NonNegativeFloat, PositiveInt, check_fields, is_whole


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: distinct blocks, each applied once per entry of `groups`, a projection after every pass.

    Attributes:
        embed_dim: channels C.
        num_heads: attention heads; a divisor of `embed_dim`.
        num_blocks: distinct weight sets.
        groups: slices in each pass of a block; its length is the number of passes. 1 is global attention.
        mlp_ratio: hidden channels of the MLP over C.
        projection_ratio: hidden channels of the non-linear projection over C; `None` leaves the projection out.
        merge: tokens merged in each slice in each layer, in order; fewer entries than layers stand for zeros after the
            last. All tokens are restored at the end of the stage (`sret.layers.merging`).
    """

    embed_dim: Channels
    num_heads: PositiveInt
    num_blocks: PositiveInt
    groups: tuple[int, ...] = (1, 1)
    mlp_ratio: NonNegativeFloat = 4.0
    projection_ratio: NonNegativeFloat | None = 1.0
    merge: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.groups, list | tuple):
            raise InputError(f"groups is {self.groups!r}; give the slices of each pass, such as (8, 2) for two passes")
        for num_groups in {repr(number): number for number in self.groups}.values():  # thousands are equal
            if not is_whole(num_groups) or num_groups < 1:
                raise InputError(f"groups {self.groups}: {num_groups!r} slices in a pass; use whole numbers >= 1")
        object.__setattr__(self, "groups", tuple(map(int, self.groups)))
        if not isinstance(self.merge, list | tuple) or not all(is_whole(r) and r >= 0 for r in self.merge):
            raise InputError(f"merge is {self.merge!r}; give whole numbers >= 0, one for each layer, such as (16, 8)")
        last = max((i for i, r in enumerate(self.merge, 1) if r), default=0)  # equal models have equal configurations
        object.__setattr__(self, "merge", tuple(map(int, self.merge[:last])))
        check_fields(self)
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} cannot form {self.num_heads} equal heads; "
                f"try {self.embed_dim // self.num_heads * self.num_heads or self.num_heads} channels"
            )
        if not self.groups:
            raise InputError("groups is empty; give the number of slices of each pass, such as (1, 1) for two passes")
        for name in ("mlp_ratio", "projection_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 1 <= self.embed_dim * ratio < 2**31:
                raise InputError(
                    f"{name} {ratio} of {self.embed_dim} channels is not a possible number of hidden channels; it must "
                    "give at least 1"
                )

        if len(self.merge) > self.depth:
            raise InputError(
                f"merge has {len(self.merge)} entries, but the stage has {self.depth} layers; give at most so many"
            )

    @property
    def num_passes(self) -> int:
        """Number of times that each block is applied."""
        return len(self.groups)

    @property
    def depth(self) -> int:
        """Layers executed per image."""
        return self.num_blocks * self.num_passes

    def with_passes(self, num_passes: int) -> "StageConfig":
        """The stage with another number of passes of each block. Those beyond its own are as the last, without merging.

        Entries of `merge` stay with their passes.
        """
        R, added = self.num_passes, max(0, num_passes - self.num_passes)
        merge = [*self.merge, *(0,) * (self.depth - len(self.merge))]
        by_block = ((*merge[i : i + R], *(0,) * added)[:num_passes] for i in range(0, self.depth, R))
        groups = (*self.groups, *self.groups[-1:] * added)[:num_passes]
        return replace(self, groups=groups, merge=tuple(chain.from_iterable(by_block)))

    def lengths(self, num_tokens: int) -> list[int]:
        """Tokens before each layer and after the last. Raises `InputError` if a layer merges too many."""
        return merged_lengths(num_tokens, self.groups * self.num_blocks, self.merge)

    def check(self, num_tokens: int) -> None:
        """Raises `InputError` if `num_tokens` cannot form the slices of some pass, or a layer merges too many."""
        most = max(self.groups)
        try:
            slice_lengths(num_tokens, most)
        except InputError as error:
            raise InputError(f"groups {self.groups}, pass {self.groups.index(most) + 1}: {error}") from None
        if self.merge:
            self.lengths(num_tokens)
